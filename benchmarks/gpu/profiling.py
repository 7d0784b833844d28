"""Which kernels run on the device, for how long, and how long it waits between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.gpu.context import Context

Span = tuple[str, float, float]  # name, start and end in microseconds
_ANNOTATIONS = ("##", "Optimizer.", "ProfilerStep", "Torch-Compiled Region", "record_param_comms")


@dataclass(frozen=True)
class Profile:
    """What ran on the device: one (name, start, end) in microseconds for each kernel or copy; on a CPU for each op."""

    spans: tuple[Span, ...]

    @property
    def totals(self) -> dict[str, tuple[int, float]]:
        """Calls and milliseconds of each name, the longest first."""
        found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        for name, start, end in self.spans:
            calls, total = found[name]
            found[name] = calls + 1, total + (end - start) / 1e3
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    @property
    def idle_share(self) -> float:
        """Share of the time from the first start to the last end in which nothing ran."""
        if not self.spans:
            return 0.0
        first, last = min(start for _, start, _ in self.spans), max(end for _, _, end in self.spans)
        return 1 - busy([(start, end) for _, start, end in self.spans]) / max(last - first, 1e-9)

    def top(self, count: int = 12) -> list[str]:
        """The `count` names that take longest, each with its share of the summed time."""
        totals = self.totals
        whole = max(sum(total for _, total in totals.values()), 1e-9)
        return [f"{total / whole:.1%} {short(name)}" for name, (_, total) in list(totals.items())[:count]]

    def table(self, rows: int = 40) -> str:
        """Text for people: milliseconds, calls and name, the longest first."""
        lines = [f"{total:10.3f} ms {calls:6d} x {name[:150]}" for name, (calls, total) in self.totals.items()]
        return "\n".join([*lines[:rows], f"idle {self.idle_share:.1%}"]) + "\n"


def short(name: str, length: int = 70) -> str:
    """A kernel's name without the words that all of them have."""
    return name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")[:length]


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def profile(context: Context, action: Callable[[], Any]) -> Profile:
    """Run `action` once under torch's profiler. It should have run before, so that nothing is prepared in here."""
    cuda = context.device.type == "cuda"
    context.synchronize()
    # the device's activity alone: noting every operator as well would slow the host down and make gaps
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        action()
        context.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    return Profile(
        tuple(
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == wanted and not _is_annotation(event)
        )
    )


def _is_annotation(event: Any) -> bool:
    """Whether an event marks a part of the program in place of a kernel; its span would cover the gaps."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith(_ANNOTATIONS)
