"""How fast images are sampled: engines against a plain decoder and against what the machine can do at all.

    python -m benchmarks.sampling --quick                                GPT-B, 256 pixels, bf16, batches of 1 and 8
    python -m benchmarks.sampling --gpt-model GPT-L --image-size 384 --batch-size 4 --engine native

Random weights: the speed does not depend on them. The plain decoder (benchmarks/plain_decoder.py) costs the same at
every position, so it runs `--plain-steps` of them; engines draw whole images, once before their time is taken. They are
measured one after the other, each with the device's memory for itself. The floor of a step is the larger of bytes over
copy bandwidth and FLOPs over the rate of a large matrix product, both measured in the same run. The last line is one
JSON object; `speedup` is plain over the fastest engine that keeps the numerics, at the largest batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from autoregressive.engine.build import ENGINES, QUANTIZE, make_engine
from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.models.noise import ImageNoise
from benchmarks.plain_decoder import plain_generate
from tokenizer.coding import decode_codes, layout_of
from tokenizer.tokenizer_image.vq_model import VQ_16
from utils.args import add_runtime_args, apply_threads, make_parser
from utils.distributed import process_group
from utils.errors import run
from utils.flops import block_weights, cache_bytes, decode_flops_per_token, head_weights
from utils.precision import DTYPES, allow_tf32


def wait(device: torch.device) -> float:
    """The time when everything asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(action: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The shortest of `repeats` runs, after one that does not count."""
    action()
    times = []
    for _ in range(repeats):
        started = wait(device)
        action()
        times.append(wait(device) - started)
    return min(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of copying tensors that no cache holds."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, 5)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square matrix product."""
    edge = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    return 2 * edge**3 / seconds_of(lambda: a @ b, device, 5)


class Clock:
    """Hears of every token: the time of the first (prefill) and of the rest (decode)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.first, self.last, self.tokens = device, 0.0, 0.0, 0
        self.started = wait(device)

    def __call__(self, position: int) -> None:
        if position == 0:
            self.first = wait(self.device)
        self.tokens = position + 1

    def stop(self) -> tuple[float, float]:
        """Seconds of the prefill, and seconds per decoded token."""
        end = wait(self.device)
        return self.first - self.started, (end - self.first) / max(self.tokens - 1, 1)


def measure_plain(model: Transformer, labels: Tensor, steps: int, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of prefill and per step of the plain decoder."""
    clock = Clock(labels.device)
    plain_generate(model, labels, steps + 1, args.cfg_scale, args.top_k, on_token=clock)
    return clock.stop()


def measure_engine(engine: Engine, labels: Tensor, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of prefill and per step of an engine over whole images."""
    clock = Clock(labels.device)
    noise = ImageNoise(range(len(labels)), labels.device)
    options = {"cfg_scale": args.cfg_scale, "cfg_interval": args.cfg_interval, "top_k": args.top_k}
    generate(engine, labels, engine.block_size, generators=noise, on_token=clock, **options)
    return clock.stop()


def step_cost(model: Transformer, rows: int, weight_bytes: int) -> dict[str, float]:
    """Bytes and FLOPs of one step of `rows` sequences at the average position."""
    context = 1 + model.block_size // 2
    item = model.tok_embeddings.weight.element_size()
    weights = (block_weights(model.config) + head_weights(model.config)) * weight_bytes
    return {
        "bytes": weights + cache_bytes(model.config, rows, context, item),
        "flops": rows * decode_flops_per_token(model.config, context),
    }


def random_gpt(args: argparse.Namespace, device: torch.device) -> Transformer:
    """A GPT with random weights, its head included, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT_models[args.gpt_model](block_size=(args.image_size // 16) ** 2, num_classes=1000)
    nn.init.normal_(model.output.weight, std=0.02)
    return model.to(device, DTYPES[args.precision]).eval()


def vq_seconds(model: Transformer, batch: int, device: torch.device) -> float:
    """Seconds to decode the codes of one image as samplers do, measured on `batch` of them in float32."""
    with torch.device(device):
        tokenizer = VQ_16().to(memory_format=layout_of(device)).eval()
        codes = torch.randint(tokenizer.config.codebook_size, (batch, model.config.grid_size**2))
    return seconds_of(lambda: decode_codes(tokenizer, codes), device, 1) / batch


def wanted(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Engine and quantization of each variant."""
    return [(name, "none") for name in args.engine] + [(args.engine[-1], q) for q in args.quantize if q != "none"]


def ready_engine(model: Transformer, name: str, quantize: str) -> tuple[str, Engine, float]:
    """An engine: what it is called in tables, itself, and the seconds until it was ready."""
    started = time.perf_counter()
    engine = make_engine(model, name, quantize)
    engine.warm_up()
    label = engine.name if quantize == "none" else f"{engine.name} {quantize}"
    return label, engine, time.perf_counter() - started


def preparing_seconds(engine: Engine) -> float:
    """Seconds that this engine has spent so far on compiling and on capturing its steps."""
    return engine.compile_seconds + getattr(engine, "ready_seconds", 0.0)


def fastest(measure_once: Callable[[], tuple[float, float]], repeats: int) -> dict[str, float]:
    """The shortest seconds of prefill and per step of `repeats` runs."""
    return dict(zip(("prefill", "step"), map(min, zip(*(measure_once() for _ in range(repeats))))))


def fastest_plain(model: Transformer, labels: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """The `fastest` runs of the plain decoder, after two steps that do not count."""
    measure_plain(model, labels, 2, args)
    return fastest(lambda: measure_plain(model, labels, args.plain_steps, args), args.repeats)


def fastest_of(engine: Engine, labels: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """The `fastest` runs of an engine, after one that does not count: it compiles and captures all of its steps."""
    measure_engine(engine, labels, args)
    return fastest(lambda: measure_engine(engine, labels, args), args.repeats)


def free_memory(device: torch.device) -> None:
    """Give back what engines that are gone had taken of a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_all(
    model: Transformer, args: argparse.Namespace, device: torch.device
) -> tuple[dict[int, dict[str, dict[str, float]]], dict[str, float]]:
    """Seconds of prefill and per step by batch size and name, the plain decoder first; and seconds until ready."""
    labels = {batch: torch.arange(batch, device=device) * 37 % model.config.num_classes for batch in args.batch_size}
    times = {batch: {"plain": fastest_plain(model, classes, args)} for batch, classes in labels.items()}
    ready = {}
    for name, quantize in wanted(args):
        free_memory(device)
        label, engine, seconds = ready_engine(model, name, quantize)
        ready[label] = seconds
        for batch, classes in labels.items():
            times[batch][label] = fastest_of(engine, classes, args)
        print(f"{label}: ready after {seconds:.1f} s; compiling and capturing took "
              f"{preparing_seconds(engine):.1f} s in all", flush=True)  # fmt: skip
        del engine  # and its caches, which at 256 images fill half of a GPU
    free_memory(device)
    return times, ready


def report(
    model: Transformer,
    batch: int,
    times: dict[str, dict[str, float]],
    ceilings: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Print the table of one batch size and return its numbers."""
    rows, steps = batch * (2 if args.cfg_scale > 1 else 1), model.block_size - 1
    out: dict[str, Any] = {"batch": batch}
    print(f"\nbatch {batch}, {rows} rows: seconds of prefill and of {steps} steps")
    print(f"{'':14} {'prefill':>8} {'decode':>8} {'ms/step':>8} {'tokens/s':>9} {'images/s':>9} {'MB/step':>8} "
          f"{'GFLOP':>7} {'floor ms':>8} {'share':>6} {'ratio':>6}")  # fmt: skip
    for name, t in times.items():
        item = 1 if name.endswith("int8") else model.tok_embeddings.weight.element_size()
        cost = step_cost(model, rows, item)
        rate = ceilings["flops"] * (2 if item == 1 else 1)
        floor = max(cost["bytes"] / ceilings["bandwidth"], cost["flops"] / rate)
        seconds = t["prefill"] + steps * t["step"]
        out[name] = {
            "prefill_s": round(t["prefill"], 4), "decode_s": round(steps * t["step"], 3),
            "step_ms": round(t["step"] * 1e3, 3), "tokens_per_s": round(batch / t["step"], 1),
            "images_per_s": round(batch / seconds, 3), "step_bytes": int(cost["bytes"]),
            "step_flops": int(cost["flops"]), "floor_ms": round(floor * 1e3, 3),
            "share_of_floor": round(floor / t["step"], 3), "ratio": round(times["plain"]["step"] / t["step"], 2),
        }  # fmt: skip
        o = out[name]
        print(f"{name:14} {o['prefill_s']:8.3f} {o['decode_s']:8.2f} {o['step_ms']:8.2f} {o['tokens_per_s']:9.1f} "
              f"{o['images_per_s']:9.3f} {cost['bytes'] / 1e6:8.1f} {cost['flops'] / 1e9:7.2f} {o['floor_ms']:8.2f} "
              f"{o['share_of_floor']:6.0%} {o['ratio']:6.2f}")  # fmt: skip
    return out


def benchmark(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure everything and print the tables."""
    model = random_gpt(args, device)
    dtype = model.tok_embeddings.weight.dtype
    ceilings = {"bandwidth": copy_bandwidth(device), "flops": matmul_rate(device, dtype)}
    print(f"{args.gpt_model}, {args.image_size} px, {dtype}, {device}, {torch.get_num_threads()} threads, guidance "
          f"{args.cfg_scale:g}: copies {ceilings['bandwidth'] / 1e9:.1f} GB/s (read and written), large products "
          f"{ceilings['flops'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    times, ready = measure_all(model, args, device)
    batches = [report(model, batch, found, ceilings, args) for batch, found in times.items()]
    vq = vq_seconds(model, 1 if args.quick else min(max(args.batch_size), 8), device)
    print(f"\nVQ-16 decoder, float32: {vq * 1e3:.2f} ms an image")
    exact = [o for name, o in batches[-1].items() if name in ready and " " not in name]
    return {
        "model": args.gpt_model, "image_size": args.image_size, "precision": args.precision, "device": str(device),
        "threads": torch.get_num_threads(), "cfg_scale": args.cfg_scale,
        "copy_gb_per_s": round(ceilings["bandwidth"] / 1e9, 2), "matmul_gflops": round(ceilings["flops"] / 1e9, 1),
        "ready_s": {name: round(seconds, 2) for name, seconds in ready.items()},
        "vq_s_per_image": round(vq, 6), "batches": batches, "speedup": max(o["ratio"] for o in exact),
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--quick", action="store_true", help="fewer plain steps, one round, one image for the tokenizer")
    flags.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size")
    flags.add_argument("--image-size", type=int, default=256, help="pixels, a multiple of 16")
    flags.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="images at once; several are allowed")
    flags.add_argument("--precision", choices=list(DTYPES), default="bf16", help="format of the weights")
    flags.add_argument("--cfg-scale", type=float, default=2.0, help="guidance scale; 1: none")
    flags.add_argument("--cfg-interval", type=float, default=-1, help="last guided step, -1: all (engines only)")
    flags.add_argument("--top-k", type=int, default=2000, help="draw from the k likeliest codes; 0: all")
    flags.add_argument("--engine", choices=ENGINES, nargs="+", default=["eager", "auto"], help="what to measure")
    flags.add_argument(
        "--quantize", choices=QUANTIZE, nargs="+", default=["int8"], help="also measure the last engine with these"
    )
    flags.add_argument("--plain-steps", type=int, help="steps of the plain decoder; the default is 48, quick 16")
    flags.add_argument("--repeats", type=int, help="rounds; the shortest time counts; the default is 3, quick 1")
    add_runtime_args(flags)
    return flags


def main() -> None:
    """Run the benchmark and print its numbers."""
    args = parser().parse_args()
    args.plain_steps = args.plain_steps or (16 if args.quick else 48)
    args.repeats = args.repeats or (1 if args.quick else 3)
    if args.image_size % 16:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of 16")
    apply_threads(args)
    allow_tf32()
    with process_group(args.device) as device:
        print(json.dumps(benchmark(args, device)))


if __name__ == "__main__":
    run(main)
