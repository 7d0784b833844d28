"""The sections in the order they run. Each is `run(context)` in the module of its name, in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """`seconds` is the limit on a GPU. Sections that are not `timed`, as they time nothing, run several at a time."""

    name: str
    seconds: float
    timed: bool = True


SECTIONS = (
    Section("probe", 30),
    Section("goldens", 70, timed=False),
    Section("kernels", 80, timed=False),
    Section("engines", 90, timed=False),
    Section("optimization", 80, timed=False),
    Section("sharded", 60, timed=False),
    Section("kernel_times", 60),
    Section("decode", 150),
    Section("variants", 60),
    Section("images", 60),
    Section("training", 170),
    Section("tokenizer", 50),
    Section("evaluator", 40),
    Section("extraction", 45),
    Section("serving", 45),
)
