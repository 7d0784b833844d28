"""What a section of the GPU program is given: where it runs, how large, and where its findings go."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Context:
    """One section's surroundings. Findings are appended to `out`/records.jsonl at once, so a killed section keeps them.

    `tiny` asks for the smallest sizes that still run every line; `seconds` is the section's limit from `started` on.
    """

    section: str
    device: torch.device
    out: Path
    tiny: bool = False
    seconds: float = 60.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds_left(self) -> float:
        """Seconds until the section is ended from outside."""
        return self.seconds - (time.perf_counter() - self.started)

    def record(self, name: str, **values: Any) -> None:
        """Write down measured `values` (numbers, texts, lists) under `name`."""
        line = {"section": self.section, "name": name, **values}
        with (self.out / "records.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self.section}: {name}: " + ", ".join(f"{k} {_short(v)}" for k, v in values.items()), flush=True)

    def check(self, name: str, passed: bool, **values: Any) -> None:
        """Write down whether something that must hold does; the section goes on either way."""
        self.record(name, passed=bool(passed), **values)

    def has_time(self, name: str, seconds: float, **values: Any) -> bool:
        """Whether `seconds` are left for the part `name`; where they are not, it is written down as left out."""
        left = self.seconds_left
        if left < seconds:
            self.record(name, **values, skipped=f"{max(left, 0.0):.0f} s left, needs {seconds:.0f}")
        return left >= seconds

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A part of a section: an exception inside is written down as a failed check, and the section goes on."""
        try:
            yield
        except Exception as error:
            text = traceback.format_exc()
            print(text, flush=True)
            self.check(name, False, error=f"{type(error).__name__}: {str(error)[:500]}", where=text[-1500:])
            self.free()

    def free(self) -> None:
        """Give cached GPU memory back before the next part."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> float:
        """The time in seconds when everything asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def median_ms(self, action: Callable[[], Any], repeats: int = 20, warm_up: int = 3) -> float:
        """Milliseconds of `action`: the median of `repeats` runs, by CUDA events on a GPU."""
        if self.tiny:
            repeats, warm_up = 2, 1
        for _ in range(warm_up):
            action()
        self.synchronize()
        if self.device.type != "cuda":
            return statistics.median(self._timed(action) for _ in range(repeats)) * 1e3
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            action()
            mark.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))

    def _timed(self, action: Callable[[], Any]) -> float:
        start = self.synchronize()
        action()
        return self.synchronize() - start

    def peak_memory_gb(self) -> float:
        """Peak of allocated GPU memory since `reset_peak`, in 1e9 bytes; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0

    def reset_peak(self) -> None:
        """Start counting the peak of allocated memory anew."""
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:300]
