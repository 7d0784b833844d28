"""Progress bars with the time left: on a terminal several times a second, in a log file twice a minute."""

from __future__ import annotations

import sys

from tqdm import tqdm

from utils.distributed import is_main


def progress(total: int, unit: str, *, done: int = 0, what: str = "", hidden: bool = False) -> tqdm:
    """A bar over `total` units of which `done` are there already; rank 0 alone shows one, unless `hidden`."""
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=what,
        dynamic_ncols=on_terminal,
        mininterval=0.2 if on_terminal else 30,
        disable=hidden or not is_main(),
    )
