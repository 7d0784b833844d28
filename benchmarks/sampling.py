"""How fast images are sampled: engines against a plain decoder and against what the machine can do at all.

    python -m benchmarks.sampling --quick                                GPT-B, 256 pixels, bf16, batches of 1 and 8
    python -m benchmarks.sampling --gpt-model GPT-L --image-size 384 --batch-size 4 --engine native

Random weights: the speed does not depend on them. Each batch size is measured in turns with the plain decoder
(benchmarks/plain_decoder.py), whose step costs the same at every position, so it runs `--plain-steps` of them; engines
draw whole images. The floor of a step is the larger of bytes over copy bandwidth and FLOPs over the rate of a large
matrix product, both measured in the same run. The last line is one JSON object; `speedup` is plain over the fastest
engine that keeps the numerics, at the largest batch.
"""

from __future__ import annotations

import argparse
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
from tokenizer.coding import decode_codes
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
    model = GPT_models[args.gpt_model](block_size=(args.image_size // 16) ** 2, num_classes=1000)
    nn.init.normal_(model.output.weight, std=0.02)
    return model.to(device, DTYPES[args.precision]).eval()


def vq_seconds(model: Transformer, batch: int, device: torch.device) -> float:
    """Seconds to decode the codes of one image as samplers do, measured on `batch` of them in float32."""
    tokenizer = VQ_16().to(device, memory_format=torch.channels_last).eval()
    edge = model.config.grid_size
    codes = torch.randint(tokenizer.config.codebook_size, (batch, edge * edge), device=device)
    with torch.no_grad():
        started = wait(device)
        decode_codes(tokenizer, codes)
        return (wait(device) - started) / batch


def variants(model: Transformer, args: argparse.Namespace) -> dict[str, tuple[Engine, float]]:
    """The engines to measure by name, each with the seconds until it was ready."""
    wanted = [(name, "none") for name in args.engine] + [(args.engine[-1], q) for q in args.quantize if q != "none"]
    made = {}
    for name, quantize in wanted:
        started = time.perf_counter()
        engine = make_engine(model, name, quantize)
        engine.warm_up()
        label = engine.name if quantize == "none" else f"{engine.name} {quantize}"
        made[label] = engine, time.perf_counter() - started
    return made


def measure_batch(
    model: Transformer,
    engines: dict[str, tuple[Engine, float]],
    batch: int,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Seconds of prefill and per step by name: the plain decoder, then all engines, `--repeats` times; the shortest."""
    labels = torch.arange(batch, device=device) * 37 % 1000
    measure_plain(model, labels, 2, args)
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.repeats):
        times.setdefault("plain", []).append(measure_plain(model, labels, args.plain_steps, args))
        for name, (engine, _) in engines.items():
            times.setdefault(name, []).append(measure_engine(engine, labels, args))
    return {name: dict(zip(("prefill", "step"), map(min, zip(*runs)))) for name, runs in times.items()}


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
    engines = variants(model, args)
    for name, (engine, seconds) in engines.items():
        print(f"{name}: ready after {seconds:.1f} s, of which {engine.compile_seconds:.1f} s compiling")
    batches = [
        report(model, batch, measure_batch(model, engines, batch, args, device), ceilings, args)
        for batch in args.batch_size
    ]
    vq = vq_seconds(model, 1 if args.quick else min(max(args.batch_size), 8), device)
    print(f"\nVQ-16 decoder, float32: {vq:.2f} s an image")
    exact = [o for name, o in batches[-1].items() if name in engines and " " not in name]
    return {
        "model": args.gpt_model, "image_size": args.image_size, "precision": args.precision, "device": str(device),
        "threads": torch.get_num_threads(), "cfg_scale": args.cfg_scale,
        "copy_gb_per_s": round(ceilings["bandwidth"] / 1e9, 2), "matmul_gflops": round(ceilings["flops"] / 1e9, 1),
        "ready_s": {name: round(seconds, 2) for name, (_, seconds) in engines.items()},
        "vq_s_per_image": round(vq, 3), "batches": batches, "speedup": max(o["ratio"] for o in exact),
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
