"""Watching the loss: a step whose loss or gradient is broken, or far off the recent ones, never reaches the weights."""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class DeviceGuard:
    """`LossGuard` for steps that are refused on the device, where the loss is: the host does not wait for it.

    `guard` hears a step's loss when the next step is judged, or at `settle`. It judges by the same rule, so it reports
    what was refused, and stops before the next update. At that time the device is busy with the next step already.
    """

    def __init__(self, guard: LossGuard) -> None:
        self.guard = guard
        self._unheard: _Judged | None = None

    def refused(self, loss: Tensor, norm: Tensor, number: int, batches: Sequence[Any]) -> Tensor:
        """1 if step `number` must not change the weights, else 0; float32, 0-d, on the device of `loss`.

        Args:
            loss: 0-d floating point; all processes must give the same.
            norm: 0-d, the norm of the gradients, on the same device; likewise.
            number: the step's.
            batches: kept until the next call, for the report.

        Raises:
            ValueError: when the step before this one ends the training (`LossGuard.admits`).
        """
        self.settle()
        numbers = torch.stack([loss, norm.to(loss.dtype)])
        spike = numbers[0].double() > self.guard.limit()  # in float64, as on the host
        self._unheard = _Judged(number, batches, _HostCopy(numbers))
        return (~numbers.isfinite().all() | spike).float()

    def settle(self) -> None:
        """Let the guard hear of the last step, once its loss is known.

        Raises:
            ValueError: when that step ends the training (`LossGuard.admits`).
        """
        if self._unheard is None:
            return
        step, self._unheard = self._unheard, None
        loss, norm = step.numbers.read()
        self.guard.admits(loss, norm, step.number, step.batches)


class _HostCopy:
    """The values of a tensor, on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event(blocking=True) if values.is_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> list[float]:
        """The values, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


class _Judged(NamedTuple):
    """A step that the device has judged and the guard does not know of yet."""

    number: int
    batches: Sequence[Any]
    numbers: _HostCopy  # loss and gradient norm
