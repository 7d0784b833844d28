"""How well a tokenizer gives back images that it was not trained on, and how it uses its codebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from evaluations.image_quality import WINDOW, psnr, ssim
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.distributed import get_rank, get_world_size, sum_over_ranks
from utils.image import to_float, to_uint8

Batch = tuple[Tensor, Tensor]


@torch.no_grad()
def reconstruct(model: VQModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode and decode: images (B, 3, H, W) in [-1, 1] -> (reconstructions alike, codes (B, h*w) int64)."""
    quant, _, (_, _, indices) = model.encode(images)
    return model.decode_code(indices, quant.shape), indices.view(len(images), -1)


@torch.no_grad()
def evaluate_reconstruction(
    model: VQModel, batches: Iterable[Batch], device: torch.device, perceptual: nn.Module | None = None
) -> dict[str, float]:
    """Measures over all `batches`, which every rank sees in the same order.

    Returns ``psnr`` (dB) and ``ssim`` (data range 1, for images of 7 pixels and more), means over images of 8-bit
    pictures; ``lpips`` if `perceptual` is given; ``codebook_usage`` (share of codes that occur), ``perplexity`` and
    ``unigram_bits`` (entropy in bits) of the codes' frequencies. The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(model.quantize.n_e, dtype=torch.float64, device=device)
    totals: dict[str, Tensor] = {}
    seen = torch.zeros((), dtype=torch.float64, device=device)
    for images in _share(batches):
        images = images.to(device)
        outputs, codes = reconstruct(model, images)
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        seen += len(images)
        for name, values in _compare(outputs, images, perceptual).items():
            totals[name] = totals.get(name, 0) + values.double().sum()
    model.train(was_training)
    # A rank without images does not know the names: all agree on the fixed order of those that exist.
    names = [name for name in ("psnr", "ssim", "lpips") if sum_over_ranks(seen.new_tensor(float(name in totals))) > 0]
    sums = sum_over_ranks(torch.stack([seen, *(totals.get(name, torch.zeros_like(seen)) for name in names)]))
    means = (sums[1:] / sums[0]).tolist()
    return {**dict(zip(names, means)), **code_statistics(sum_over_ranks(counts))}


def _share(batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The images of this process's batches."""
    for number, (images, _) in enumerate(batches):
        if number % get_world_size() == get_rank():
            yield images


def _compare(outputs: Tensor, images: Tensor, perceptual: nn.Module | None) -> dict[str, Tensor]:
    """Each measure of each image, (B,)."""
    seen, reference = to_float(to_uint8(outputs)), to_float(to_uint8(images))
    measures = {"psnr": psnr(seen, reference, data_range=2.0)}
    if min(images.shape[-2:]) >= WINDOW:
        measures["ssim"] = ssim((seen + 1) / 2, (reference + 1) / 2)
    if perceptual is not None:
        measures["lpips"] = perceptual(reference, seen).flatten()
    return measures


def code_statistics(counts: Tensor) -> dict[str, float]:
    """``codebook_usage``, ``perplexity`` and ``unigram_bits`` of how often each code occurred, (K,) float64."""
    shares = counts / counts.sum()
    entropy = float(-(shares * shares.clamp_min(1e-12).log2()).sum())
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "perplexity": 2**entropy,
        "unigram_bits": entropy,
    }
