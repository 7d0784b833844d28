"""From class labels to pictures: GPT, then the tokenizer's decoder."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autoregressive.build import add_gpt_args, load_gpt, require_null_class
from autoregressive.engine.build import add_engine_args, make_engine
from autoregressive.models.engine import Engine
from autoregressive.models.generate import Model, generate
from autoregressive.models.noise import ImageNoise
from autoregressive.models.sampling import check_sampling, min_p_filtering
from autoregressive.models.schedules import SCHEDULES, share
from tokenizer.build import add_decode_precision_arg, add_vq_args, load_tokenizer
from tokenizer.coding import GPU_BATCH, ImageDecoder
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.args import add_runtime_args
from utils.precision import DTYPES, HALF_PRECISION, allow_tf32
from utils.seeding import mix_seed

OnToken = Callable[[int], None]


def add_model_args(
    parser: argparse.ArgumentParser,
    cfg_scale: float = 4.0,
    top_k: int = 2000,
    gpt_type: str = "c2i",
    image_size: int = 384,
) -> None:
    """Both models, how they are drawn from, and the machine: what all commands that draw share."""
    add_gpt_args(parser, gpt_type, image_size)
    parser.add_argument(
        "--from-fsdp",
        action="store_true",
        help="formats are recognised without it; it names a folder of samples by the checkpoint's folder",
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="the same as --engine compiled"
    )
    add_vq_args(parser)
    add_sampling_args(parser, cfg_scale, top_k)
    add_runtime_args(parser)


def add_sampling_args(parser: argparse.ArgumentParser, cfg_scale: float = 4.0, top_k: int = 2000) -> None:
    """Guidance, filtering and the number formats of sampling."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg-scale", type=float, default=cfg_scale, help="guidance scale; 1 and less is no guidance")
    group.add_argument("--cfg-interval", type=float, default=-1, help="last decode step that is guided; -1: all")
    group.add_argument("--cfg-start", type=int, default=0, help="first token that is guided")
    group.add_argument(
        "--cfg-schedule",
        choices=SCHEDULES,
        default="constant",
        help="how guidance grows, from none at an image's first token to --cfg-scale at its last",
    )
    group.add_argument("--cfg-power", type=float, default=1.0, help="of power-cosine; above 1: grows later")
    group.add_argument("--top-k", type=int, default=top_k, help="draw from the k likeliest codes; 0: all")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest codes of this mass; 1: all")
    group.add_argument(
        "--min-p", type=float, default=0.0, help="drop codes less likely than this share of the likeliest; 0: none"
    )
    group.add_argument("--temperature", type=float, default=1.0, help="below 1: likelier codes, above 1: more variety")
    group.add_argument(
        "--temperature-end", type=float, help="temperature of an image's last token; the default is --temperature"
    )
    group.add_argument(
        "--temperature-schedule",
        choices=[name for name in SCHEDULES if name in ("linear", "cosine")],
        default="linear",
        help="the way from --temperature to --temperature-end",
    )
    group.add_argument(
        "--precision", choices=["none", "fp16", "bf16"], default="bf16", help="format of the GPT's weights"
    )
    add_decode_precision_arg(group)
    add_engine_args(parser)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_sampling_args` as keywords of `generate`.

    Raises:
        ValueError: a value that means nothing.
    """
    check_sampling(args.cfg_scale, args.top_k, args.top_p, args.temperature, args.temperature_end or 0.0)
    min_p_filtering(torch.zeros(1), args.min_p)
    share(args.cfg_schedule, 0.0, args.cfg_power)
    names = ("cfg_scale", "cfg_interval", "cfg_start", "cfg_schedule", "cfg_power", "top_k", "top_p", "min_p")
    heat = ("temperature", "temperature_end", "temperature_schedule")
    return {name: getattr(args, name) for name in (*names, *heat)} | {"sample_logits": True}


def load_models(args: argparse.Namespace, device: torch.device, gpt_type: str = "c2i") -> tuple[Engine, VQModel]:
    """The GPT and the tokenizer of `args`, ready to draw on `device`.

    Raises:
        ValueError: settings that mean nothing, or a checkpoint that is missing or does not fit them.
    """
    if args.gpt_type != gpt_type:
        what = {"c2i": "classes", "t2i": "prompts"}[gpt_type]
        raise ValueError(f"this command draws {what}; --gpt-type {args.gpt_type} is not for it")
    sampling_options(args)
    allow_tf32()
    tokenizer = load_tokenizer(args, device)
    gpt = load_gpt(args, tokenizer.config.codebook_size, device, DTYPES[args.precision])
    require_null_class(gpt, args)
    return make_engine(gpt, engine_name(args), args.quantize, args.kv_cache_dtype), tokenizer


def make_decoder(args: argparse.Namespace, tokenizer: VQModel, batch_size: int = GPU_BATCH) -> ImageDecoder:
    """The decoder of --decode-precision, with the weights that `tokenizer` has now.

    A GPU takes at most `batch_size` images at a time. There a half-precision decoder is compiled, where Triton is
    installed, which takes its time at the first batch of a size; on a CPU none is.
    """
    half = args.decode_precision in HALF_PRECISION
    on_gpu = tokenizer.post_quant_conv.weight.device.type == "cuda"
    compiled = half and on_gpu and importlib.util.find_spec("triton") is not None
    return ImageDecoder(tokenizer, args.decode_precision, compiled, batch_size)


def engine_name(args: argparse.Namespace) -> str:
    """--engine, where --compile is the older way to ask for the compiled one."""
    if args.compile and args.engine not in ("auto", "compiled"):
        raise ValueError(f"--compile means --engine compiled; it does not go with --engine {args.engine}")
    return "compiled" if args.compile else args.engine


def image_generators(seeds: Sequence[int], device: torch.device) -> ImageNoise:
    """The randomness of each image: made of its seed alone."""
    return ImageNoise([mix_seed(seed) for seed in seeds], device)


def sample_codes(
    gpt: Model,
    cond: Tensor,
    args: argparse.Namespace,
    seeds: Sequence[int] | None,
    on_token: OnToken | None = None,
    **options: Any,
) -> Tensor:
    """Draw the codes of one image for each row of `cond`, labels (B,) or caption features: int32 (B, N).

    `options` are further ones of `generate`.

    With `seeds` every image has a generator of its own, so it does not depend on the batch it is drawn in; with None
    all draws come from torch's global generator in the established order.
    """
    generators = None if seeds is None else image_generators(seeds, cond.device)
    options = {**sampling_options(args), **options}
    return generate(gpt, cond, gpt.block_size, generators=generators, on_token=on_token, **options)
