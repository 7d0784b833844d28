"""Workers draw batches: in a process of their own, which may die and be started again, or in a thread of this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from autoregressive.serve.cards import Card
from autoregressive.serve.studio import Job, Studio
from utils.batches import in_batches
from utils.distributed import process_group

_COMMAND = Path(__file__).with_name("worker.py")
_PATIENCE = 60.0  # seconds without a word after which a worker that was told to stop is killed


class GivenUp(Exception):
    """Nobody waits for any picture of a batch any more."""


class WorkerDied(RuntimeError):
    """The worker's process is gone."""


class Batch(Protocol):
    """What a worker is given: jobs of one key, and whom to tell."""

    jobs: list[Job]

    @property
    def given_up(self) -> bool:
        """Whether nobody wants it any more."""
        ...

    @property
    def again(self) -> bool:
        """Whether it went wrong before; it is then one job, and no other is to suffer from it."""
        ...

    def tell(self, rows: range, done: int, total: int, previews: np.ndarray | None) -> None:
        """These rows of the batch have `done` of `total` codes, and look like `previews` (len(rows), edge, edge, 3)."""
        ...


class Worker(Protocol):
    """Draws one batch at a time; its methods are called from one thread, except `kill`."""

    def start(self) -> None:
        """Load the models. Raises ValueError for a checkpoint that is missing or does not fit."""
        ...

    def draw(self, batch: Batch) -> np.ndarray:
        """The pictures uint8 (B, edge, edge, 3). Raises GivenUp, WorkerDied, or what went wrong."""
        ...

    def kill(self) -> None:
        """End it, whatever it does."""
        ...


class Hand:
    """A studio that draws any batch that fits into memory, if need be in parts; remembers how much that is."""

    def __init__(self, cards: Sequence[Card], device: str | None, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        with process_group(device) as chosen:
            self._studio = Studio(cards, chosen)
        self.engines = {card.name: self._studio.engine_name(card.name) for card in cards}
        self._limit: int | None = None

    def draw(self, jobs: list[Job], tell: Callable[[range, int, int, np.ndarray | None], None]) -> np.ndarray:
        """The pictures of jobs with one key. `tell` is called as in `Batch`; it may raise, to stop."""
        pictures: list[np.ndarray] = []

        def part(some: list[Job]) -> np.ndarray:
            first = sum(map(len, pictures))
            rows = range(first, first + len(some))
            return self._studio.draw(some, lambda *report: tell(rows, *report))

        size = self._limit or len(jobs)
        parts = [jobs[first : first + size] for first in range(0, len(jobs), size)]
        for some, drawn in in_batches(part, parts):
            pictures.append(drawn)
            if len(pictures) == 1 and len(some) < min(size, len(jobs)):
                self._limit = len(some)
        return np.concatenate(pictures)


class ThreadWorker:
    """Draws in the calling thread."""

    def __init__(self, cards: Sequence[Card], device: str | None, threads: int | None) -> None:
        self._make = lambda: Hand(cards, device, threads)
        self.engines: dict[str, str] = {}

    def start(self) -> None:
        """Load the models."""
        self._hand = self._make()
        self.engines = self._hand.engines

    def draw(self, batch: Batch) -> np.ndarray:
        """The pictures of a batch."""

        def tell(*report: Any) -> None:
            if batch.given_up:
                raise GivenUp
            batch.tell(*report)

        return self._hand.draw(batch.jobs, tell)

    def kill(self) -> None:
        """Nothing can end a thread; it stops at the next code when its batch is given up."""


class ProcessWorker:
    """Draws in a process of its own. The two talk through a socket pair in our own types; nothing of a user's is
    unpickled, as requests are made of numbers, texts and arrays before they come here."""

    def __init__(self, cards: Sequence[Card], device: str | None, threads: int | None) -> None:
        self._order = (list(cards), device, threads)
        self._process: subprocess.Popen[bytes] | None = None
        self.engines: dict[str, str] = {}

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process and wait until it has loaded the models."""
        self.kill()
        self._line, theirs = multiprocessing.Pipe()
        # Not multiprocessing's spawn, which would import the main program again. A session of its own: Ctrl-C is for
        # the server, which lets its workers finish.
        command = [sys.executable, str(_COMMAND), str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        try:
            self._line.send(self._order)
            kind, content = self._line.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(f"a worker ended while it loaded the models ({self._end()})") from error
        if kind != "ready":
            self.kill()
            raise ValueError(content)
        self.engines = content

    def draw(self, batch: Batch) -> np.ndarray:
        """The pictures of a batch."""
        try:
            self._line.send(("draw", batch.jobs))
            return self._follow(batch)
        except (EOFError, OSError) as error:
            raise WorkerDied(f"a worker died ({self._end()})") from error

    def _follow(self, batch: Batch) -> np.ndarray:
        told_to_stop, heard = False, time.monotonic()
        while True:
            if batch.given_up and not told_to_stop:
                self._line.send(("stop", None))
                told_to_stop = True
            if not self._line.poll(0.1):
                if told_to_stop and time.monotonic() - heard > _PATIENCE:
                    self.kill()
                    raise EOFError
                continue
            heard = time.monotonic()
            kind, content = self._line.recv()
            if kind == "progress":
                batch.tell(*content)
            elif kind == "drawn":
                return content
            elif kind == "stopped":
                raise GivenUp
            else:
                raise RuntimeError(content)

    def _end(self) -> str:
        """How the process ended, in words."""
        self.kill()
        assert self._process is not None
        code = self._process.returncode
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End the process, if it has not ended by itself."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # an end that has begun says more than ours would
        self._process.kill()
        self._process.wait()
