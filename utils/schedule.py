"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "linear", "wsd")


def lr_factor(step: int, total: int, schedule: str = "constant", warmup: int = 0, floor: float = 0.0) -> float:
    """What to multiply the base learning rate by at `step` (1-based) of `total`.

    `warmup` steps rise linearly from 0. Then: "constant"; "cosine" or "linear" decay to `floor`; "wsd" (warm-up,
    stable, decay) stays constant to half of the run and then falls linearly to `floor`.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)
    if schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        fall = 1 - progress
    elif schedule == "wsd":
        fall = min(1.0, 2 * (1 - progress))
    else:
        raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
    return floor + (1 - floor) * fall
