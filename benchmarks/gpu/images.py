"""Whole images through the sampler's own path: codes of a class by the GPT, then the tokenizer's decoder."""

from __future__ import annotations

import argparse

import torch

from autoregressive.build import build_gpt
from autoregressive.engine.build import make_engine
from autoregressive.models.config import ModelArgs
from autoregressive.models.engine import Engine
from autoregressive.sample import sample_c2i
from autoregressive.sample.classes import ClassNames
from autoregressive.sample.painter import Painter, class_subjects
from autoregressive.sample.pipeline import engine_name, make_decoder
from benchmarks.gpu.context import Context
from tokenizer.build import build_tokenizer
from tokenizer.coding import ImageDecoder, layout_of
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.flops import block_weights, cache_bytes, head_weights
from utils.image import save_png, to_uint8
from utils.precision import DTYPES, allow_tf32

_SPARE_GB = 8.0  # for activations, captured graphs and the tokenizer


def run(context: Context) -> None:
    """Small batch with compilation and again without, then the large one; then all with a decoder in bf16."""
    allow_tf32()
    args = sampler_args(context)
    engine, tokenizer = random_models(args, context.device)
    small, large = (8, 256) if not context.tiny else (2, 3)
    for precision in ("none", "bf16"):
        args.decode_precision = precision
        decode = make_decoder(args, tokenizer)
        for batch, first in ((small, True), (small, False), (large, True), (large, False)):
            name = f"images, batch {batch}, decoder {precision}"
            with context.attempt(name):
                reason = _reason_to_skip(context, args, engine.model.config, batch, first)
                if reason:
                    context.record(name, skipped=reason)
                else:
                    _sample(context, args, engine, decode, batch, first)


def sampler_args(context: Context) -> argparse.Namespace:
    """The flags of `sample_c2i.py`: GPT-L at 384 pixels with guidance."""
    if context.tiny:
        flags = ["--gpt-model", "GPT-XS", "--image-size", "16", "--downsample-size", "4", "--vq-model", "VQ-4-S"]
        flags += ["--codebook-size", "64", "--engine", "eager", "--precision", "none", "--top-k", "8"]
    else:
        flags = ["--gpt-model", "GPT-L", "--image-size", "384"]
    return sample_c2i.parser().parse_args([*flags, "--cfg-scale", "2"])


def random_models(args: argparse.Namespace, device: torch.device) -> tuple[Engine, VQModel]:
    """Engine and tokenizer as `load_models` makes them, with random weights; the GPT's head too, which begins at 0."""
    torch.manual_seed(0)
    with device:
        tokenizer = build_tokenizer(args).to(memory_format=layout_of(device)).eval()
        gpt = build_gpt(args, tokenizer.config.codebook_size)
        torch.nn.init.normal_(gpt.output.weight, std=gpt.config.initializer_range)
    gpt = gpt.to(DTYPES[args.precision]).eval()
    return make_engine(gpt, engine_name(args), args.quantize, args.kv_cache_dtype), tokenizer


def _reason_to_skip(
    context: Context, args: argparse.Namespace, config: ModelArgs, batch: int, first: bool
) -> str | None:
    """Why a batch cannot be sampled here, or None."""
    if context.seconds_left < (14 if first else 10):
        return f"{context.seconds_left:.0f} s left"
    if context.device.type != "cuda":
        return None
    weights = 2 * (block_weights(config) + head_weights(config))
    value, scale = (2, 0) if args.kv_cache_dtype == "auto" else (1, 4)
    caches = cache_bytes(config, 2 * batch, config.cls_token_num + config.block_size, value, scale)
    needed = (weights + caches) / 1e9 + _SPARE_GB
    there = torch.cuda.get_device_properties(context.device).total_memory / 1e9
    return f"needs about {needed:.0f} of {there:.0f} GB" if needed > there else None


def _sample(
    context: Context, args: argparse.Namespace, engine: Engine, decode: ImageDecoder, batch: int, first: bool
) -> None:
    """Sample `batch` images of as many classes and record how long both halves took."""
    args = argparse.Namespace(**{**vars(args), "batch_size": batch})
    ids = [number % args.num_classes for number in range(batch)]
    painter = Painter(
        args,
        class_subjects(ids, ClassNames(args.num_classes)),
        lambda numbers, on_token: sample_c2i.codes_of(numbers, engine, ids, args, on_token),
        decode,
        engine.block_size,
    )
    context.reset_peak()
    images = painter.paint()
    seconds = painter.sampling_seconds + painter.decoding_seconds
    context.record(
        "images", batch=batch, decode_precision=args.decode_precision, includes_compiling=first,
        images_per_s=batch / seconds,
        tokens_seconds=painter.sampling_seconds, ms_per_token=1e3 * painter.sampling_seconds / engine.block_size,
        vq_seconds=painter.decoding_seconds, vq_ms_per_image=1e3 * painter.decoding_seconds / batch,
        peak_gb=context.peak_memory_gb(),
    )  # fmt: skip
    context.check(
        f"images, batch {batch}, decoder {args.decode_precision}, finite",
        bool(images.isfinite().all()),
        shape=list(images.shape),
    )
    save_png(to_uint8(images[:1])[0], context.out / f"image-{batch}.png")
