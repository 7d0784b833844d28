"""How fast the GPT trains, and how much memory that takes, against a plain eager loop in the same run.

    python -m benchmarks.training --quick                                  GPT-B, 8 images of 256 codes, a few steps
    python -m benchmarks.training --gpt-model GPT-L --batch-size 32 --steps 20 --compile

Each variant runs in a process of its own, so that its peak memory is its own: "plain" is the model in a bare loop
(all logits, F.cross_entropy, AdamW without fusing), "trainer" is the step of the training commands (loss in pieces,
fused AdamW, clipping, seeds, the guard against broken losses, losses kept for the log). Random codes: the speed does
not depend on them. MFU is against the data sheet of a known GPU, elsewhere against the rate of a large bfloat16 matrix
product measured in the same process. The last line is one JSON object; `speedup` is the first variant's seconds per
step over those of the fastest trainer.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from autoregressive.build import build_gpt, latent_grid
from autoregressive.models.gpt import GPT_models
from autoregressive.train import train_c2i
from autoregressive.train.step import TrainStep, dropout_fields
from utils.args import add_runtime_args, apply_threads, make_parser
from utils.distributed import get_rank, process_group
from utils.errors import run
from utils.flops import hardware_of, mfu, training_flops_per_image
from utils.guard import LossGuard
from utils.optim import decay_groups
from utils.precision import allow_tf32, autocast
from utils.seeding import seed_step
from utils.throughput import peak_memory
from utils.trainer import _Window

Step = Callable[[int], Mapping[str, Tensor]]  # from the number of a step to its losses by name

_MATRIX = 2048  # edge of the matrix product that measures the machine


def variants(device: torch.device, compiled: bool) -> list[str]:
    """What is compared on this device, the reference first: "plain" or "trainer", a number format, maybe "compiled"."""
    names = ["plain bf16", "trainer bf16"] if device.type == "cuda" else ["plain fp32", "plain bf16", "trainer bf16"]
    return names + ["trainer bf16 compiled"] * compiled


def training_args(args: argparse.Namespace, variant: str) -> argparse.Namespace:
    """The settings of the training command for a variant."""
    flags = ["--code-path", "none", "--gpt-model", args.gpt_model, "--image-size", str(args.image_size)]
    flags += ["--global-batch-size", str(args.batch_size), "--mixed-precision", variant.split()[1]]
    flags += ["--gradient-accumulation-steps", str(args.gradient_accumulation_steps)]
    flags += ["--compile" if "compiled" in variant else "--no-compile"]
    return train_c2i.parser().parse_args([*flags, "--activation-checkpointing", args.activation_checkpointing])


def make_step(args: argparse.Namespace, variant: str, device: torch.device) -> Step:
    """One optimizer step on fixed random codes: from its number to its named losses."""
    chosen = training_args(args, variant)
    batches = random_batches(args, chosen, device)
    make = trainer_step if variant.startswith("trainer") else plain_step
    return make(chosen, batches, device)


def random_batches(args: argparse.Namespace, chosen: argparse.Namespace, device: torch.device) -> list[list[Tensor]]:
    """The micro-batches of a step as a loader gives them: codes int64 (B, 1, N) and labels int64 (B, 1)."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(chosen.vocab_size, (args.batch_size, 1, latent_grid(args) ** 2), generator=generator)
    labels = torch.randint(chosen.num_classes, (args.batch_size, 1), generator=generator)
    if device.type == "cuda":
        codes, labels = codes.pin_memory(), labels.pin_memory()
    size = args.batch_size // chosen.gradient_accumulation_steps
    return [list(batch) for batch in zip(codes.split(size), labels.split(size))]


def trainer_step(chosen: argparse.Namespace, batches: list[list[Tensor]], device: torch.device) -> Step:
    """The step of the training commands, seeded and guarded against broken losses as there."""
    folder = Path(tempfile.gettempdir(), "llamagen-benchmark-bad-batches")  # made if a loss is broken
    guard = LossGuard(chosen.on_bad_loss, chosen.spike_threshold, folder, logging.getLogger("llamagen"))
    step = TrainStep(chosen, device, total_steps=10**6, guard=guard)

    def guarded(number: int) -> Mapping[str, Tensor]:
        seed_step(chosen.global_seed, number, get_rank())
        return step(batches, number)

    return guarded


def plain_step(chosen: argparse.Namespace, batches: list[list[Tensor]], device: torch.device) -> Step:
    """The step that one would write first."""
    torch.manual_seed(0)
    model = build_gpt(chosen, chosen.vocab_size, **dropout_fields(chosen)).to(device).train()
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters(), 0.05), lr=1e-4, betas=(0.9, 0.95))
    there = [(codes[:, 0].to(device), labels[:, 0].to(device)) for codes, labels in batches]

    def plain(number: int) -> Mapping[str, Tensor]:
        losses = []
        for codes, labels in there:
            with autocast(device, chosen.mixed_precision):
                _, loss = model(codes[:, :-1], labels, targets=codes)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": torch.stack(losses).mean()}

    return plain


def seconds_per_step(step: Step, steps: int, device: torch.device) -> float:
    """The mean of `steps` steps in a row, logged as a training logs them: nothing here waits for the device between."""
    window, started = _Window(device), wait(device)
    for number in range(steps):
        window.add(step(2 + number))  # number 1 is the one that does not count
    window.means()
    return (wait(device) - started) / steps


def wait(device: torch.device) -> float:
    """The time when everything asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(args: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Seconds of a step (after one that does not count), tokens/s, MFU, peak memory, first loss."""
    apply_threads(args)
    allow_tf32()
    with process_group(args.device) as device:
        step = make_step(args, variant, device)
        first = step(1)["loss"].item()
        seconds = seconds_per_step(step, args.steps, device)
        memory = peak_memory(device)
        hardware = hardware_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        peak = hardware.flops_per_second if hardware else matrix_rate(device)
    chosen = training_args(args, variant)
    with torch.device("meta"):
        flops = args.batch_size * training_flops_per_image(build_gpt(chosen, chosen.vocab_size).config)
    return {
        "variant": variant,
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(args.batch_size * latent_grid(args) ** 2 / seconds, 1),
        "mfu": round(flops / seconds / peak, 4) if not hardware else round(mfu(flops, seconds, hardware), 4),
        "peak_memory_gb": round(memory / 1e9, 2),
        "first_loss": round(first, 4),
    }


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 matrix product here."""
    a = torch.randn(_MATRIX, _MATRIX, device=device, dtype=torch.bfloat16)
    a @ a
    started = wait(device)
    for _ in range(3):
        a @ a
    return 3 * 2 * _MATRIX**3 / (wait(device) - started)


def measure_apart(variant: str) -> dict[str, Any]:
    """`measure` in a process of its own, with this command's flags."""
    line = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--variant", variant]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(line, cwd=root, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"the variant {variant!r} did not end well (exit code {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants and compare them."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results = []
    for variant in variants(device, args.compile):
        found = measure_apart(variant)
        results.append(found)
        print(
            f"{variant:22} {found['seconds_per_step']:>9.3f} s/step {found['tokens_per_second']:>12,.1f} tokens/s "
            f"MFU {found['mfu']:>6.1%} {found['peak_memory_gb']:>7.2f} GB  first loss {found['first_loss']:.4f}",
            flush=True,
        )
    best = min((r for r in results if r["variant"].startswith("trainer")), key=lambda r: r["seconds_per_step"])
    return {
        "gpt_model": args.gpt_model, "image_size": args.image_size, "batch_size": args.batch_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "threads": args.num_threads or torch.get_num_threads(), "variants": results,
        "speedup": round(results[0]["seconds_per_step"] / best["seconds_per_step"], 3),
        "memory_ratio": round(best["peak_memory_gb"] / results[0]["peak_memory_gb"], 3),
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--quick", action="store_true", help="two steps that count, whatever --steps says")
    flags.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size")
    flags.add_argument("--image-size", type=int, default=256, help="edge of the images in pixels")
    flags.add_argument("--downsample-size", type=int, default=16, help="pixels per code along an edge")
    flags.add_argument("--batch-size", type=int, default=8, help="images of a step")
    flags.add_argument("--gradient-accumulation-steps", type=int, default=1, help="micro-batches of a step")
    flags.add_argument("--steps", type=int, default=5, help="steps that count; one before them does not")
    flags.add_argument("--activation-checkpointing", choices=["none", "selective", "full"], default="none",
                       help="of the trainer")  # fmt: skip
    flags.add_argument("--compile", action="store_true", help="also with torch.compile, which takes its time first")
    flags.add_argument("--variant", help="measure this one alone, in this process")
    add_runtime_args(flags)
    return flags


def main() -> None:
    """Run the benchmark and print its numbers."""
    args = parser().parse_args()
    args.steps = 2 if args.quick else args.steps
    if args.batch_size % args.gradient_accumulation_steps:
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of --gradient-accumulation-steps")
    print(json.dumps(measure(args, args.variant) if args.variant else benchmark(args)))


if __name__ == "__main__":
    run(main)
