"""The VQ tokenizer: encoding and its codes, decoding in all formats and layouts, the quantizer, a training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoregressive.serve.cards import EMOJI
from benchmarks.gpu.context import Context
from tokenizer.coding import ImageDecoder, encode_images, layout_of
from tokenizer.nearest import exact_arithmetic
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.train_step import TrainStep
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils import checkpoint
from utils.image import to_float
from utils.precision import allow_tf32


class Variant(NamedTuple):
    """A way to decode: number format, layout of the weights, whether the decoder is compiled."""

    precision: str  # "fp32", "tf32", "autocast bf16" or "bf16"; or a name for people
    channels_last: bool | None = True  # None: as it is
    compiled: bool = False


_VARIANTS = (
    Variant("fp32"),
    Variant("tf32"),
    Variant("autocast bf16"),
    Variant("bf16"),
    Variant("tf32", channels_last=False),
    Variant("bf16", channels_last=False),
)
_COMPILED = (Variant("bf16", compiled=True),)
_COMPILING = 18  # seconds that are needed to begin it


def run(context: Context) -> None:
    """All parts of this section, the fastest to measure first."""
    allow_tf32()
    model = random_tokenizer(context)
    small, large, batches = (256, 384, (16, 64, 1)) if not context.tiny else (16, 32, (2, 1))
    for size in (large, small):
        with context.attempt(f"decode, {size} px, batch {batches[0]}"):
            decode_variants(context, model, size, batches[0], _VARIANTS)
    with context.attempt("encode"):
        encode(context, model, small, batches[0])
    with context.attempt("equal codes of trained weights"):
        trained_codes(context)
    with context.attempt("training step"):
        training_step(context, max(small, 32))  # what the discriminator needs
    with context.attempt("quantizer"):
        quantizer(context, model)
    for size in (large, small):
        with context.attempt(f"decode, {size} px, batch {batches[0]}, compiled"):
            decode_variants(context, model, size, batches[0], _COMPILED)
    for size in (large, small):
        for batch in batches[1:]:
            with context.attempt(f"decode, {size} px, batch {batch}"):
                decode_variants(context, model, size, batch, _VARIANTS[1:4])


def random_tokenizer(context: Context) -> VQModel:
    """A tokenizer of random weights in evaluation mode, laid out as by `load_tokenizer`."""
    torch.manual_seed(0)
    with context.device:
        model = VQ_models["VQ-16" if not context.tiny else "VQ-4-S"]()
    return model.to(memory_format=layout_of(context.device)).eval()


def arithmetic(device_type: str, precision: str) -> AbstractContextManager:
    """What "fp32", "tf32", "autocast bf16" or "bf16" means for the surroundings, in which TF32 is allowed."""
    if precision == "fp32":
        return exact_arithmetic(device_type)
    if precision == "autocast bf16":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return nullcontext()


def seconds_bound(context: Context, action: Callable[[], object], seconds: float = 0.4) -> float:
    """Milliseconds of `action`, the median of as many runs as fit into about `seconds`, at least three."""
    once = context.median_ms(action, repeats=1, warm_up=1)
    if context.tiny:
        return once
    return context.median_ms(action, repeats=min(max(int(seconds * 1e3 / max(once, 1e-3)), 3), 20), warm_up=0)


@torch.inference_mode()
def decode_variants(context: Context, model: VQModel, size: int, batch: int, variants: tuple[Variant, ...]) -> None:
    """Milliseconds an image of each variant and of `decode_codes`, and how far it is from float32."""
    edge = size // model.stride
    codes = torch.randint(model.config.codebook_size, (batch, edge**2), device=context.device)
    latents = model.quantize.get_codebook_entry(codes, (batch, model.config.codebook_embed_dim, edge, edge))
    with arithmetic(context.device.type, "fp32"):
        exact = model.decode(latents[:2])
    for variant in variants:
        if not context.has_time("decode", _COMPILING if variant.compiled else 3, image_size=size, batch=batch):
            continue
        with context.attempt(f"decode, {size} px, batch {batch}, {variant}"):
            decode = _decoder(context, model, variant)
            with arithmetic(context.device.type, variant.precision):
                psnr = _psnr(decode(latents)[:2].float(), exact)
                milliseconds = seconds_bound(context, partial(decode, latents))
            _record_decode(context, size, batch, variant, milliseconds, psnr)
            del decode
    paths = _own_paths(context, model, codes, variants is _COMPILED)
    for name, path in paths.items():
        needed = _COMPILING if variants is _COMPILED else 3
        if context.has_time("decode", needed, image_size=size, batch=batch, precision=name):
            psnr, milliseconds = _psnr(path()[:2], exact), seconds_bound(context, path)
            _record_decode(context, size, batch, Variant(name, channels_last=None), milliseconds, psnr)


def _own_paths(context: Context, model: VQModel, codes: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """How the commands decode."""
    if compiled:  # the compiler of a CPU takes half a minute: the tiny run goes without
        return {"bf16 decoder, compiled": partial(ImageDecoder(model, "bf16", compiled=not context.tiny), codes)}
    return {
        "as the samplers do": partial(ImageDecoder(model), codes),
        "bf16 decoder": partial(ImageDecoder(model, "bf16"), codes),
    }


def _record_decode(context: Context, size: int, batch: int, variant: Variant, ms: float, psnr: float) -> None:
    layout = {True: "channels last", False: "contiguous", None: "its own"}[variant.channels_last]
    context.record(
        "decode", image_size=size, batch=batch, precision=variant.precision, layout=layout, compiled=variant.compiled,
        ms_per_image=ms / batch, psnr_db=psnr,
    )  # fmt: skip


def _decoder(context: Context, model: VQModel, variant: Variant) -> Callable[[Tensor], Tensor]:
    """Latents (B, D, h, w) float32 to images, by a copy of `model` in the variant's format and layout."""
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    dtype = torch.bfloat16 if variant.precision == "bf16" else torch.float32
    with context.device:
        copy = VQModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(dtype, memory_format=layout).eval()
    decode: Callable[[Tensor], Tensor] = copy.decode
    if variant.compiled:
        torch._dynamo.reset()  # else a second size would be compiled for any size
        decode = torch.compile(copy.decode, backend="inductor" if not context.tiny else "aot_eager")
    return lambda latents: decode(latents.to(dtype))


def _psnr(found: Tensor, exact: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, where the peak is the range of `exact`; at most 200."""
    error = (found.double() - exact.double()).square().mean()
    peak = (exact.max() - exact.min()).double()
    return min((10 * torch.log10(peak**2 / error.clamp(min=1e-30))).item(), 200.0)


@torch.inference_mode()
def encode(context: Context, model: VQModel, size: int, batch: int) -> None:
    """Milliseconds an image in float32, as code extraction does it, and in TF32, with the share of equal codes."""
    images = torch.rand(batch, 3, size, size, device=context.device) * 2 - 1
    exact = encode_images(model, images)
    milliseconds = seconds_bound(context, lambda: encode_images(model, images))
    context.record("encode", image_size=size, batch=batch, precision="fp32", ms_per_image=milliseconds / batch,
                   share_of_equal_codes=1.0)  # fmt: skip
    for precision in ("tf32", "autocast bf16"):
        with arithmetic(context.device.type, precision):
            codes = model.encode(images)[2][2]
            milliseconds = seconds_bound(context, lambda: model.encode(images))
        share = (codes.flatten() == exact.flatten()).float().mean().item()
        context.record("encode", image_size=size, batch=batch, precision=precision, ms_per_image=milliseconds / batch,
                       share_of_equal_codes=share)  # fmt: skip


@torch.inference_mode()
def trained_codes(context: Context) -> None:
    """The share of equal codes in TF32 and bfloat16 for a trained tokenizer and the images that it was trained for."""
    with context.device:
        model = VQ_models["VQ-8-S"](codebook_size=512)
    checkpoint.load_weights(model, EMOJI / "tokenizer.safetensors")
    model.eval()
    images = to_float(_sheet_images(EMOJI / "samples-class.png")[: 96 if not context.tiny else 2]).to(context.device)
    exact = encode_images(model, images).flatten()
    on_cpu = encode_images(model.cpu(), images.cpu()).flatten().to(context.device)
    model.to(context.device)
    shares = {"float32_on_a_cpu": (on_cpu == exact).float().mean().item()}
    for precision in ("tf32", "autocast bf16"):
        with arithmetic(context.device.type, precision):
            codes = model.encode(images)[2][2].flatten()
        shares[precision.replace(" ", "_")] = (codes == exact).float().mean().item()
    named = {f"share_of_equal_codes_{name}": share for name, share in shares.items()}
    passed = shares["float32_on_a_cpu"] > 0.99
    context.check("codes of the emoji tokenizer", passed, images=len(images), codes=len(exact), **named)


def _sheet_images(path: Path, edge: int = 64, padding: int = 2) -> Tensor:
    """The images uint8 (N, edge, edge, 3) of a grid as `make_grid_image` makes it."""
    sheet = torch.from_numpy(np.array(Image.open(path).convert("RGB")))[padding:, padding:]
    step = edge + padding
    rows, columns = sheet.shape[0] // step, sheet.shape[1] // step
    cells = sheet.view(rows, step, columns, step, 3)[:, :edge, :, :edge]
    return cells.transpose(1, 2).reshape(-1, edge, edge, 3)


@torch.inference_mode()
def quantizer(context: Context, model: VQModel) -> None:
    """Milliseconds of the search for the nearest codes alone."""
    batch, edge = (64, 16) if not context.tiny else (2, 4)
    latents = torch.randn(batch, model.config.codebook_embed_dim, edge, edge, device=context.device)
    milliseconds = seconds_bound(context, lambda: model.quantize(latents))
    context.record("quantizer", tokens=batch * edge**2, codes=model.config.codebook_size, ms=milliseconds,
                   ms_per_image=milliseconds / batch)  # fmt: skip


def training_step(context: Context, size: int) -> None:
    """A step of tokenizer and discriminator in bfloat16, without LPIPS, whose weights are a download."""
    batch = 16 if not context.tiny else 1
    flags = ["--data-path", "-", "--perceptual-weight", "0", "--disc-start", "1", "--mixed-precision", "bf16"]
    args = vq_train.parser().parse_args([*flags, "--image-size", str(size)])
    images = torch.rand(batch, 3, size, size, device=context.device) * 2 - 1
    context.reset_peak()
    model = random_tokenizer(context)
    step = TrainStep(args, model, None, context.device, 10**6)
    batches = [(images, torch.zeros(batch))]
    milliseconds = seconds_bound(context, lambda: step(batches, 1), seconds=3.0)
    losses = step(batches, 1)
    context.record("training step", image_size=size, batch=batch, ms=milliseconds,
                   images_per_s=1e3 * batch / milliseconds, peak_gb=context.peak_memory_gb())  # fmt: skip
    context.check("training step, finite", all(float(value) == float(value) for value in losses.values()))
