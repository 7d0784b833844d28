"""How fast the tokenizer is, and how much memory training takes, against a plain implementation in the same run.

    python -m benchmarks.tokenizer            repeats more often, larger batches
    python -m benchmarks.tokenizer --quick    under four minutes on two CPU cores

VQ-16 at 256 x 256 pixels with random weights, the same in both; that both give the same codes and pictures is checked
first. Measured, plain and ours in turns, the fastest of each: the quantizer at 4,096 tokens x 16,384 codes, alone and
with its losses and gradients; encoding; decoding; a training step of tokenizer and discriminator, and its peak memory
above what lies there between steps. Everything is float32, but for the training step (bf16 autocast in both, the
default) and the rows named so. The plain one is benchmarks/plain_tokenizer.py. The last line is one JSON object;
`speedup` is the geometric mean of the five ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.plain_tokenizer import PlainTrainStep, PlainVQ
from tokenizer.coding import ImageDecoder, layout_of
from tokenizer.nearest import exact_arithmetic
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.discriminator_patchgan import NLayerDiscriminator
from tokenizer.tokenizer_image.train_step import TrainStep
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.args import make_parser
from utils.errors import run
from utils.precision import DTYPES, allow_tf32

TOKENS = 4096
Work = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(works: Mapping[str, Work], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of the fastest of `repeats` runs of each, after one that does not count."""
    best = dict.fromkeys(works, math.inf)
    for number in range(repeats + 1):
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_megabytes(work: Work, device: torch.device) -> float | None:
    """Memory that `work` needs at its peak above what is in use before; None where it cannot be told."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    except OSError:
        return None
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(what: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) / 1e3


def both_models(device: torch.device, model: str) -> tuple[PlainVQ, VQModel]:
    """Two models with the same random weights."""
    torch.manual_seed(0)
    ours = VQ_models[model]()
    plain = PlainVQ(ours.config)
    plain.load_state_dict(ours.state_dict())
    return plain.to(device).eval(), ours.to(device, memory_format=layout_of(device)).eval()


@torch.inference_mode()
def require_equal(plain: PlainVQ, ours: VQModel, images: Tensor) -> None:
    """Raise RuntimeError when the two do not compute the same. With TF32 they would not: rounding moves codes."""
    with exact_arithmetic(images.device.type):
        codes, _, indices = plain.encode(images)
        _, _, (_, _, our_indices) = ours.encode(images)
        difference = (plain.decode(codes) - ours.decode(codes)).abs().max().item()
    if (agreement := (indices == our_indices).float().mean().item()) < 0.99:
        raise RuntimeError(f"only {agreement:.1%} of the codes agree")
    if difference > 1e-2:
        raise RuntimeError(f"the decoded pictures differ by {difference}")


def quantizer_works(plain: PlainVQ, ours: VQModel, device: torch.device) -> dict[str, dict[str, Work]]:
    """The quantizers on 4,096 tokens, in evaluation and in training."""
    latents = torch.randn(TOKENS // 256, ours.config.codebook_embed_dim, 16, 16, device=device)

    def forward(quantizer: torch.nn.Module) -> Work:
        return torch.inference_mode()(lambda: quantizer.eval()(latents))

    def with_gradients(quantizer: torch.nn.Module) -> Work:
        def work() -> None:
            z = latents.clone().requires_grad_()
            quant, losses, _ = quantizer.train()(z)
            (quant.square().mean() + sum(losses[:3])).backward()
            quantizer.zero_grad()

        return work

    pair = {"plain": plain.quantize, "ours": ours.quantize}
    return {
        "quantizer": {name: forward(quantizer) for name, quantizer in pair.items()},
        "quantizer with gradients": {name: with_gradients(quantizer) for name, quantizer in pair.items()},
    }


def picture_works(plain: PlainVQ, ours: VQModel, images: Tensor, compiled: bool = False) -> dict[str, dict[str, Work]]:
    """Encoding and decoding; bf16 as --decode-precision bf16 does it, and `compiled` too if asked for."""
    with torch.inference_mode():
        codes, _, indices = plain.eval().encode(images)
    laid_out = images.contiguous(memory_format=layout_of(images.device))
    rows, count = indices.view(len(images), -1), len(images)
    half = {"ours, bf16": ImageDecoder(ours, "bf16", batch_size=count)}
    if compiled:
        half["ours, bf16 compiled"] = ImageDecoder(ours, "bf16", compiled=True, batch_size=count)
    return {
        "encode": {
            "plain": torch.inference_mode()(lambda: plain.eval().encode(images)),
            "ours": torch.inference_mode()(lambda: ours.eval().encode(laid_out)),
        },
        "decode": {
            "plain": torch.inference_mode()(lambda: plain.decode(codes)),
            "ours": torch.inference_mode()(lambda: ours.decode_code(indices, codes.shape)),
            **{name: partial(decoder, rows) for name, decoder in half.items()},
        },
    }


def training_works(plain: PlainVQ, ours: VQModel, images: Tensor, precision: str) -> dict[str, Work]:
    """A step of tokenizer and discriminator, without LPIPS (whose weights are a download)."""
    flags = ["--data-path", "-", "--perceptual-weight", "0", "--disc-start", "1", "--mixed-precision", precision]
    step = TrainStep(vq_train.parser().parse_args(flags), ours, None, images.device, 10**6)
    discriminator = NLayerDiscriminator().to(images.device)
    discriminator.load_state_dict(step.discriminator.state_dict())
    dtype = None if precision == "none" else DTYPES[precision]
    plain_step = PlainTrainStep(plain, discriminator, 1e-4, dtype)
    batch = [(images, torch.zeros(len(images)))]
    return {"plain": lambda: plain_step(images), "ours": lambda: step(batch, 1)}


def benchmark(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure everything and print a table."""
    on_gpu = device.type == "cuda"
    many = args.repeats or (2 if args.quick else 5)
    batch = args.batch_size or (32 if on_gpu else 1 if args.quick else 4)
    training_batch = args.training_batch_size or (16 if on_gpu else 1)
    plain, ours = both_models(device, args.vq_model)
    images = torch.rand(batch, 3, args.image_size, args.image_size, device=device) * 2 - 1
    require_equal(plain, ours, images)
    works = {**quantizer_works(plain, ours, device), **picture_works(plain, ours, images, args.compile)}
    seconds = {name: in_turns(pair, many, device) for name, pair in works.items()}
    steps = training_works(plain, ours, images[:training_batch], args.mixed_precision)
    seconds["training step"] = in_turns(steps, max(1, many // 2), device)
    memory = {name: peak_megabytes(step, device) for name, step in steps.items()}
    ratios = {name: times["plain"] / times["ours"] for name, times in seconds.items()}
    for name, times in seconds.items():
        row = "   ".join(f"{which} {value * 1e3:>9,.1f} ms" for which, value in times.items())
        print(f"{name:25} {row}   {ratios[name]:.2f} times as fast")
    if None not in memory.values():
        print(f"{'peak memory of a step':25} plain {memory['plain']:>9,.0f} MB   ours {memory['ours']:>9,.0f} MB")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(), "vq_model": args.vq_model, "image_size": args.image_size,
        "batch": batch, "training_batch": training_batch,
        "images_per_second": {
            name: {which: round(batch / value, 3) for which, value in seconds[name].items()}
            for name in ("encode", "decode")
        },
        "seconds": {name: {k: round(v, 5) for k, v in times.items()} for name, times in seconds.items()},
        "training_peak_mb": {name: value and round(value) for name, value in memory.items()},
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "speedup": round(math.prod(ratios.values()) ** (1 / len(ratios)), 2),
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--quick", action="store_true", help="few repeats and single images")
    flags.add_argument("--vq-model", choices=list(VQ_models), default="VQ-16", help="size of the tokenizer")
    flags.add_argument("--image-size", type=int, default=256, help="edge of the images in pixels")
    flags.add_argument(
        "--batch-size", type=int, help="images that are encoded at once; the default depends on the device"
    )
    flags.add_argument("--training-batch-size", type=int, help="images of a training step; likewise")
    flags.add_argument(
        "--repeats", type=int, help="runs of each, of which the fastest counts; the default is 5, quick 2"
    )
    flags.add_argument("--compile", action="store_true", help="also decode by a compiled decoder in bf16")
    flags.add_argument("--mixed-precision", choices=list(DTYPES), default="bf16", help="autocast of the training step")
    flags.add_argument("--device", help="cuda or cpu; the default is a GPU where there is one")
    flags.add_argument("--num-threads", type=int, help="CPU threads; the default is torch's choice")
    return flags


def main() -> None:
    """Run the benchmark and print its numbers."""
    args = parser().parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    allow_tf32()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps(benchmark(args, device)))


if __name__ == "__main__":
    run(main)
