"""Number formats: autocast, loss scaling and TF32, by the names the commands use."""

from __future__ import annotations

import contextlib

import torch

DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FULL_PRECISION = ("none", "fp32", "tf32")  # "fp32" is the one that leaves TF32 off
HALF_PRECISION = ("bf16", "fp16")


def autocast(device: torch.device, name: str) -> contextlib.AbstractContextManager:
    """Autocast to bf16 or fp16; a no-op for the names of full precision."""
    if name in FULL_PRECISION:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[name])


def grad_scaler(device: torch.device, name: str) -> torch.amp.GradScaler:
    """A loss scaler, active for fp16 alone."""
    return torch.amp.GradScaler(device.type, enabled=name == "fp16")


def allow_tf32() -> None:
    """Let float32 matrix products and convolutions use TF32 on GPUs that have it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
