"""Watching the loss: a step whose loss or gradient is broken, or far off the recent ones, never reaches the weights."""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import checkpoint
from utils.distributed import get_rank

RECENT, NEEDED = 200, 20  # losses that are remembered; how many are needed to judge by
_MOST_IN_A_ROW = 20
_LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves is no reason to call a small step a spike


def add_guard_args(parser: argparse.ArgumentParser) -> None:
    """What to do about a broken loss."""
    group = parser.add_argument_group("broken losses")
    group.add_argument(
        "--on-bad-loss",
        choices=["stop", "skip"],
        default="stop",
        help="when the loss or the gradient is not finite, or spikes: stop, or leave the step out and go on",
    )
    group.add_argument(
        "--spike-threshold",
        type=float,
        default=0.0,
        help=f"a spike is this many robust deviations above the median of the last {RECENT} losses; 0: no such check",
    )


class LossGuard:
    """Judges each step before its update. All processes must give it the same loss and norm.

    The deviation is 1.4826 times the median absolute deviation, which a few outliers do not move, and at least 1 % of
    the median. Batches that are refused are written to `folder` for inspection, one file per process.
    """

    def __init__(self, action: str, threshold: float, folder: Path, logger: logging.Logger) -> None:
        self.action, self.threshold, self.folder, self.logger = action, threshold, folder, logger
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.in_a_row = 0

    def admits(self, loss: float, norm: float, number: int, batches: Sequence[Any]) -> bool:
        """Whether step `number` may change the weights.

        Raises:
            ValueError: when it may not and the action is "stop", or after 20 refusals in a row.
        """
        reason = self._reason(loss, norm)
        if reason is None:
            self.recent.append(loss)
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        path = self.folder / f"{number:07d}-rank{get_rank()}.pt"
        checkpoint.save({"step": number, "loss": loss, "grad_norm": norm, "batches": list(batches)}, path)
        if self.action == "stop" or self.in_a_row >= _MOST_IN_A_ROW:
            again = f", {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
            raise ValueError(
                f"{reason} at step {number}{again}; the weights were not changed and the batch is in {path}. "
                f"--on-bad-loss skip goes on without it; else try a lower --lr, --max-grad-norm 1.0 or "
                f"--mixed-precision without fp16"
            )
        self.logger.warning(f"(step={number:07d}) Skipped: {reason}; the batch is in {path}")
        return False

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is not a finite number ({loss})"
        if not math.isfinite(norm):
            return f"the gradient norm is not a finite number ({norm})"
        limit = self.limit()
        return f"the loss {loss:.4f} is above {limit:.4f}, where a spike begins," if loss > limit else None

    def limit(self) -> float:
        """The loss above which a step counts as a spike."""
        if not self.threshold or len(self.recent) < NEEDED:
            return math.inf
        median = statistics.median(self.recent)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.recent)
        return median + self.threshold * max(deviation, _LEAST_SPREAD * abs(median))

    def state_dict(self) -> dict[str, Any]:
        """What later judgements depend on."""
        return {"recent": list(self.recent), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.recent = deque(state["recent"], maxlen=RECENT)
        self.in_a_row = state["in_a_row"]
