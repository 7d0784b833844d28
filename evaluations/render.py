"""From numbered pictures to a folder of PNGs and an npz: any number of them, on any number of processes, resumable.

A command gives `draw`, which makes the pictures of given numbers. Picture i must depend on i alone, not on which
others are drawn beside it; then it does not matter which process draws it, in which batch, or after how many restarts.
"""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from utils.batches import in_batches
from utils.claim import claim_folder
from utils.distributed import barrier, broadcast_object, get_world_size, group_store, is_main
from utils.files import atomic_path
from utils.image import save_png
from utils.progress import progress

_WRITERS = 4  # threads that compress PNGs while the next batch is drawn
_ARRAY = "arr_0"


class Drawn(NamedTuple):
    """Pictures uint8 (n, H, W, 3), and for each what is worth knowing of it (label, seed, PSNR): plain values."""

    pictures: Tensor
    notes: Sequence[Mapping[str, Any]]


Draw = Callable[[list[int]], Drawn]


def render(
    draw: Draw,
    count: int,
    folder: str | Path,
    *,
    batch_size: int,
    settings: Mapping[str, Any],
    npz: bool = True,
    order_seed: int | None = None,
) -> Path:
    """Draw pictures 0 to `count` - 1 into ``{folder}/{index:06d}.png``, and all of them into ``{folder}.npz``.

    Pictures that are there already are kept. Each PNG holds its notes as text. ``{folder}.json`` records `settings`.
    The npz has one array ``arr_0``, uint8 (count, H, W, 3), in the order of the numbers, or in a random order made of
    `order_seed` (the Inception Score is a mean over consecutive splits). Every process calls this; each takes the next
    batch when it has finished one, so none idles while there is work. All return when everything is written. Where the
    memory does not suffice for a batch, it is halved. Returns the folder.

    Raises:
        ValueError: when the folder holds pictures of other settings, or the memory does not suffice for one picture.
    """
    folder = Path(folder)
    missing = _claim(folder, count, settings)
    bar = progress(count, "image", done=count - len(missing), what=folder.name)
    queue, batches = SharedQueue(), split_evenly(missing, batch_size, get_world_size())
    with bar, ThreadPoolExecutor(_WRITERS) as writers:
        pending: list[Future] = []
        for indices, drawn in in_batches(draw, queue.take(batches)):
            for future in pending:
                future.result()  # a full disk ends the work here
            pictures = drawn.pictures.cpu().numpy()
            pending = [
                writers.submit(save_png, picture, picture_path(folder, index), note)
                for index, picture, note in zip(indices, pictures, drawn.notes, strict=True)
            ]
            bar.update(queue.finish(len(indices)))
        for future in pending:
            future.result()
        queue.wait(bar.update)
    if npz and is_main():
        write_npz(folder, count, order_seed)
    barrier()
    return folder


def picture_path(folder: str | Path, index: int) -> Path:
    """Where picture number `index` lies."""
    return Path(folder) / f"{index:06d}.png"


def beside(folder: str | Path, suffix: str) -> Path:
    """A file beside the folder that is named like it: its npz, its settings."""
    return Path(folder).with_name(Path(folder).name + suffix)  # with_suffix would cut a name such as "cfg-1.5"


def _claim(folder: Path, count: int, settings: Mapping[str, Any]) -> list[int]:
    """The numbers that are still to be drawn, the same list on all processes; the folder is ours afterwards."""
    problem, missing = None, []
    if is_main():
        try:
            claim_folder(folder, beside(folder, ".json"), settings, "pictures")
        except ValueError as error:
            problem = str(error)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                left_over.unlink()
            there = {entry.name for entry in os.scandir(folder)}
            missing = [i for i in range(count) if picture_path(folder, i).name not in there]
    problem, missing = broadcast_object((problem, missing))
    if problem:
        raise ValueError(problem)
    return missing


def split_evenly(items: Sequence[int], batch_size: int, workers: int) -> list[Sequence[int]]:
    """Consecutive batches of `batch_size`; what is less than a full batch for every worker is split evenly."""
    full = len(items) // (batch_size * workers) * batch_size * workers
    batches = [items[i : i + batch_size] for i in range(0, full, batch_size)]
    rest = items[full:]
    bounds = [len(rest) * i // workers for i in range(workers + 1)]
    return batches + [rest[low:high] for low, high in pairwise(bounds) if high > low]


class SharedQueue:
    """Hands out work to whichever process asks next, by counters in the process group's store.

    All processes make it together.
    """

    _made = 0  # so that each queue has counters of its own, under the same name on every process

    def __init__(self) -> None:
        SharedQueue._made += 1
        self._store = group_store() if get_world_size() > 1 else None
        self._name = f"queue{SharedQueue._made}"
        self._counts: dict[str, int] = {}
        self._seen = 0

    def take(self, work: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Yield the pieces of `work`, the same list on every process, that fall to this one."""
        while (number := self._add("taken", 1) - 1) < len(work):
            yield work[number]

    def finish(self, count: int) -> int:
        """Note `count` finished items; returns how many all processes finished since this one last asked."""
        before, self._seen = self._seen, self._add("finished", count)
        return self._seen - before

    def wait(self, report: Callable[[int], Any]) -> None:
        """Wait until every process is here, however long the others take; `report` hears what they finish."""
        self._add("ended", 1)
        while self._add("ended", 0) < get_world_size():
            time.sleep(0.2)
            report(self.finish(0))
        report(self.finish(0))

    def _add(self, counter: str, count: int) -> int:
        if self._store is not None:
            return self._store.add(f"{self._name}/{counter}", count)
        self._counts[counter] = self._counts.get(counter, 0) + count
        return self._counts[counter]


def write_npz(folder: str | Path, count: int, order_seed: int | None = None) -> Path:
    """Put the first `count` PNGs of `folder` into ``{folder}.npz``, one picture in memory at a time.

    The same pictures give the same bytes.

    Raises:
        ValueError: when a picture is missing or has another size than the first.
    """
    order = np.arange(count)
    if order_seed is not None:
        np.random.default_rng(order_seed).shuffle(order)
    shape = _read(folder, 0).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    target = beside(folder, ".npz")
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo(f"{_ARRAY}.npy")  # without the time of day
        with archive.open(entry, "w", force_zip64=True) as file, progress(count, "image", what=target.name) as bar:
            np.lib.format.write_array_header_1_0(file, header)
            for index in order:
                picture = _read(folder, index)
                if picture.shape != shape:
                    raise ValueError(f"{picture_path(folder, index)} is {picture.shape}, the first picture is {shape}")
                file.write(picture.tobytes())
                bar.update()
    return target


def _read(folder: str | Path, index: int) -> np.ndarray:
    path = picture_path(folder, index)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"cannot read the picture {path} ({error}); remove it and run the command again") from error


def read_notes(folder: str | Path, count: int) -> Iterator[dict[str, str]]:
    """The notes of pictures 0 to `count` - 1, read from the PNGs; values are text, as `save_png` wrote them."""
    for index in range(count):
        with Image.open(picture_path(folder, index)) as image:
            yield dict(image.text)
