"""How well a tokenizer gives back images that it was not trained on, and how it uses its codebook."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from evaluations.image_quality import psnr
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.distributed import get_rank, get_world_size, sum_over_ranks
from utils.image import to_float, to_uint8


@torch.no_grad()
def reconstruct(model: VQModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode and decode: images (B, 3, H, W) in [-1, 1] -> (reconstructions alike, codes (B, h*w) int64)."""
    quant, _, (_, _, indices) = model.encode(images)
    return model.decode_code(indices, quant.shape), indices.view(len(images), -1)


@torch.no_grad()
def evaluate_reconstruction(
    model: VQModel, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> dict[str, float]:
    """Measures over all `batches`, which every rank sees in the same order.

    Returns ``psnr`` (dB, mean over images of 8-bit pictures), ``codebook_usage`` (share of codes that occur) and
    ``perplexity`` (of the codes' frequencies). The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(model.quantize.n_e, dtype=torch.float64, device=device)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for number, (images, _) in enumerate(batches):
        if number % get_world_size() == get_rank():
            images = images.to(device)
            outputs, codes = reconstruct(model, images)
            counts += torch.bincount(codes.flatten(), minlength=len(counts))
            quality = psnr(to_float(to_uint8(outputs)), to_float(to_uint8(images)), data_range=2.0)
            totals += torch.stack([quality.double().sum(), torch.tensor(len(images), device=device)])
    model.train(was_training)
    counts, (quality, images_seen) = sum_over_ranks(counts), sum_over_ranks(totals).tolist()
    shares = counts / counts.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return {
        "psnr": quality / images_seen,
        "codebook_usage": float((counts > 0).double().mean()),
        "perplexity": float(entropy.exp()),
    }
