"""How strength grows over an image: the share of its full value that a setting has at each token.

Linear growth is that of MUSE (Chang et al. 2023, arXiv:2301.00704), VAR (Tian et al. 2024, arXiv:2404.02905)
and MAR (Li et al. 2024, arXiv:2406.11838) for guidance, and of MaskGIT (Chang et al. 2022, arXiv:2202.04200),
downwards, for temperature. Power-cosine is that of MDTv2 (Gao et al. 2023, arXiv:2303.14389) and RAR (Yu et
al. 2024, arXiv:2411.00776).
"""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine", "power-cosine")


def share(schedule: str, progress: float, power: float = 1.0) -> float:
    """The share, 0 to 1, of the full change that has been made at `progress`, 0 (first token) to 1 (last).

    constant: 1 throughout. linear: t. cosine: (1 - cos(pi t)) / 2. power-cosine: the same of t ** `power`;
    powers above 1 wait longer before they rise. ValueError for an unknown name or a power that is not positive.
    """
    if power <= 0:
        raise ValueError(f"the power of a schedule is above 0, not {power}")
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return progress
    if schedule in ("cosine", "power-cosine"):
        warped = progress**power if schedule == "power-cosine" else progress
        return (1 - math.cos(math.pi * warped)) / 2
    raise ValueError(f"unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")


def values(count: int, start: float, end: float, schedule: str, power: float = 1.0) -> list[float]:
    """A value for each of `count` tokens, from `start` at the first to `end` at the last; constant: all `end`."""
    shares = [share(schedule, i / max(count - 1, 1), power) for i in range(count)]
    return [end if s == 1 else start + (end - start) * s for s in shares]
