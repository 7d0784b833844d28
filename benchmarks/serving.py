"""How fast images are drawn for many: vLLM, this project's own engine in batches, and `generate` one image at a time.

    python -m benchmarks.serving --quick                 GPT-B, 64 codes an image, 8 images
    python -m benchmarks.serving --images 16             256 codes an image

Random weights: the speed does not depend on them. vLLM works in its own environment (scripts/setup_vllm.sh; $VENV_VLLM
or .venv-vllm), on the same weights, seeds, cores and number of threads; it is left out where that is not there. All
draw the same images, so the share of codes that vLLM draws as the own engine does is printed too: rounding makes them
differ now and then. Times are of drawing alone, after one short call. `ratio` is to one image at a time, by the clock
and by the processor's time, which other work on the machine disturbs less. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from autoregressive.engine.build import ENGINES, make_engine
from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from autoregressive.sample.pipeline import image_generators
from autoregressive.serve.export import export_model
from benchmarks.sampling import random_gpt, wait
from utils.args import add_runtime_args, apply_threads, make_parser
from utils.distributed import process_group
from utils.errors import run
from utils.precision import DTYPES

Seconds = tuple[float, float]  # on the clock, and of the processor
ROOT = Path(__file__).resolve().parents[1]


def timed(action: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[Seconds, Tensor]:
    """The shortest of `repeats` runs, by the clock and by the processor, and what the last one gave."""
    runs = []
    for _ in range(repeats):
        started, worked = wait(device), time.process_time()
        result = action()
        runs.append((wait(device) - started, time.process_time() - worked))
    clock, processor = map(min, zip(*runs))
    return (clock, processor), result


def labels_of(args: argparse.Namespace) -> list[int]:
    """A class for each image."""
    return [number * 37 % 1000 for number in range(args.images)]


def draw(engine: Engine, args: argparse.Namespace, numbers: range, device: torch.device) -> Tensor:
    """The codes of the images with these numbers, by an engine of this project."""
    labels = torch.tensor([labels_of(args)[i] for i in numbers], device=device)
    noise = image_generators(numbers, device)
    options = {"cfg_scale": args.cfg_scale, "top_k": args.top_k}
    return generate(engine, labels, engine.block_size, generators=noise, **options)


def vllm_worker(args: argparse.Namespace) -> None:
    """In vLLM's environment: draw the images, and print seconds and codes as JSON."""
    from autoregressive.serve.llm import LLM

    with LLM(args.worker, max_images=args.images) as llm:
        options = {"seeds": 0, "cfg_scale": args.cfg_scale, "top_k": args.top_k}
        llm.generate(labels_of(args)[:1], **options)
        seconds, codes = timed(lambda: llm.generate(labels_of(args), **options), torch.device("cpu"), args.repeats)
    print(json.dumps({"seconds": seconds, "codes": codes.tolist()}))


def measure_vllm(args: argparse.Namespace, folder: Path) -> tuple[Seconds, Tensor]:
    """Seconds and codes of vLLM, from a process of its own."""
    cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(len(cores)),
    }
    flags = {"worker": folder, "images": args.images, "cfg-scale": args.cfg_scale, "top-k": args.top_k}
    line = [str(Path(args.venv) / "bin/python"), "-m", "benchmarks.serving", "--repeats", str(args.repeats)]
    line += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vLLM failed: {done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], torch.tensor(result["codes"])


def measure_own(
    args: argparse.Namespace, engine: Engine, device: torch.device, images: int, batch: int
) -> tuple[Seconds, Tensor]:
    """Seconds and codes of `images` images in batches of `batch`, by an engine of this project."""
    batches = [range(first, min(first + batch, images)) for first in range(0, images, batch)]
    generate(engine, torch.zeros(batch, dtype=torch.long, device=device), 2, cfg_scale=args.cfg_scale)
    return timed(
        lambda: torch.cat([draw(engine, args, numbers, device) for numbers in batches]).cpu(), device, args.repeats
    )


def report(name: str, seconds: Seconds, images: int, codes: int, base: Seconds | None) -> dict[str, Any]:
    """Print one line of the table and return its numbers; `base` are the seconds of one image drawn alone."""
    clock, processor = seconds
    row = {
        "images": images, "seconds": round(clock, 2), "cpu_seconds": round(processor, 2),
        "tokens_per_s": round(images * codes / clock, 1), "images_per_s": round(images / clock, 3),
        "ratio": 1.0, "cpu_ratio": 1.0,
    }  # fmt: skip
    if base is not None:
        row |= {"ratio": round(base[0] * images / clock, 2), "cpu_ratio": round(base[1] * images / processor, 2)}
    print(f"{name:24} {images:7} {row['seconds']:8.2f} {row['cpu_seconds']:7.2f} {row['tokens_per_s']:9.1f} "
          f"{row['images_per_s']:9.3f} {row['ratio']:6.2f} {row['cpu_ratio']:6.2f}", flush=True)  # fmt: skip
    return row


def benchmark(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure everything and print the table."""
    model = random_gpt(args, device)
    codes = model.block_size
    print(f"{args.gpt_model}, {codes} codes an image, {args.precision}, {device}, {torch.get_num_threads()} threads, "
          f"guidance {args.cfg_scale:g}, top-k {args.top_k}")  # fmt: skip
    print(f"{'':24} {'images':>7} {'seconds':>8} {'CPU s':>7} {'tokens/s':>9} {'images/s':>9} {'ratio':>6} "
          f"{'by CPU':>6}")  # fmt: skip
    rows = {}
    seconds, _ = measure_own(args, Engine(model), device, args.single_images, 1)
    base = seconds[0] / args.single_images, seconds[1] / args.single_images
    rows["generate, one at a time"] = report("generate, one at a time", seconds, args.single_images, codes, None)
    engine = make_engine(model, args.engine)
    seconds, own = measure_own(args, engine, device, args.images, args.images)
    rows[f"{engine.name}, one batch"] = report(f"{engine.name}, one batch", seconds, args.images, codes, base)
    equal = None
    if any(Path(args.venv).glob(".llamagen-*")):
        with tempfile.TemporaryDirectory() as folder:
            seconds, drawn = measure_vllm(args, export_model(model, Path(folder) / "gpt"))
        rows["vLLM"] = report("vLLM", seconds, args.images, codes, base)
        equal = round((drawn == own).float().mean().item(), 4)
        print(f"{equal:.2%} of vLLM's codes are those of the {engine.name} engine")
    else:
        print(f"vLLM is not in {args.venv} (bash scripts/setup_vllm.sh): left out")
    return {
        "model": args.gpt_model, "codes": codes, "precision": args.precision, "device": str(device),
        "threads": torch.get_num_threads(), "cfg_scale": args.cfg_scale, "rows": rows, "equal_codes": equal,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--quick", action="store_true", help="64 codes an image")
    flags.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size")
    flags.add_argument("--image-size", type=int, default=256, help="pixels, a multiple of 16")
    flags.add_argument("--images", type=int, default=8, help="images in all, and drawn at once")
    flags.add_argument("--single-images", type=int, default=1, help="images that are drawn one at a time")
    flags.add_argument("--precision", choices=list(DTYPES), default="none", help="format of the weights")
    flags.add_argument("--cfg-scale", type=float, default=4.0, help="guidance scale; 1: none")
    flags.add_argument("--top-k", type=int, default=2000, help="draw from the k likeliest codes; 0: all")
    flags.add_argument("--engine", choices=ENGINES, default="auto", help="the own engine")
    flags.add_argument("--repeats", type=int, default=1, help="rounds; the shortest time counts")
    flags.add_argument("--venv", default=os.environ.get("VENV_VLLM", str(ROOT / ".venv-vllm")), help="with vLLM in it")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    add_runtime_args(flags)
    return flags


def main() -> None:
    """Run the benchmark and print its numbers."""
    args = parser().parse_args()
    if args.worker:
        vllm_worker(args)
        return
    if args.quick:
        args.image_size = 128
    if args.image_size % 16 or min(args.images, args.single_images, args.repeats) < 1:
        raise ValueError("--image-size is a multiple of 16; --images, --single-images and --repeats are at least 1")
    apply_threads(args)
    with process_group(args.device) as device:
        print(json.dumps(benchmark(args, device)))


if __name__ == "__main__":
    run(main)
