"""How fast a training runs, and the line that says so."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

from utils.flops import hardware_of, mfu


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step of all processes together takes in and costs: tokens, and FLOPs of the model."""

    tokens: int
    flops: float


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on this GPU so far, or that this process took of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def speed_of(cost: StepCost | None, steps_per_second: float, device: torch.device, devices: int) -> dict[str, float]:
    """Named speeds of a training on `devices` devices like `device`.

    ``mfu`` is there for GPUs whose peak is known (utils/flops.py), ``teraflops_per_device`` for all.
    """
    speed = {"steps_per_second": steps_per_second, "memory_gb": peak_memory(device) / 1e9}
    if cost is None:
        return speed
    speed["tokens_per_second"] = cost.tokens * steps_per_second
    speed["teraflops_per_device"] = cost.flops * steps_per_second / devices / 1e12
    hardware = hardware_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if hardware is not None:
        speed["mfu"] = mfu(cost.flops * steps_per_second, 1.0, hardware, devices)
    return speed


def log_line(step: int, means: Mapping[str, float], speed: Mapping[str, float], seconds_left: float) -> str:
    """One line for people; its beginning is what scripts around the established trainers read.

    `means` has the loss first, and maybe ``grad_norm`` and ``lr``; `speed` comes from `speed_of`.
    """
    parts = [f"Train Loss: {next(iter(means.values())):.4f}", f"Train Steps/Sec: {speed['steps_per_second']:.2f}"]
    shown = {
        "grad_norm": "Grad Norm: {:.3f}",
        "lr": "LR: {:.2e}",
        "tokens_per_second": "Tokens/Sec: {:,.0f}",
        "mfu": "MFU: {:.1%}",
        "memory_gb": "Memory: {:.1f} GB",
    }
    if "mfu" not in speed:
        shown["teraflops_per_device"] = "TFLOP/s per device: {:.3g}"
    known = {**means, **speed}
    parts += [text.format(known[name]) for name, text in shown.items() if name in known]
    return f"(step={step:07d}) {', '.join(parts)}, ETA: {tqdm.format_interval(seconds_left)}"
