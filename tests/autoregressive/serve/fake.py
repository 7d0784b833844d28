"""A worker without a model, which a test holds back, breaks or kills as it likes."""

from __future__ import annotations

import contextlib
import threading

import numpy as np

from autoregressive.serve.batching import LocalSource
from autoregressive.serve.workers import GivenUp, WorkerDied


def picture_of(seed):
    return np.full((16, 16, 3), seed % 256, np.uint8)


class FakeWorker:
    """Draws pictures whose pixels are their seed. `gate` holds it back; `deadly` seeds kill it, `broken` ones fail."""

    def __init__(self, deadly=(), broken=(), starts=()):
        self.batches, self.deadly, self.broken, self.starts = [], deadly, broken, list(starts)
        self.gate, self.at_work = threading.Event(), threading.Event()
        self.gate.set()
        self.started = 0

    def start(self):
        self.started += 1
        if self.starts and (error := self.starts.pop(0)):
            raise error

    def draw(self, batch):
        self.batches.append([job.seed for job in batch.jobs])
        self.at_work.set()
        batch.tell(range(len(batch.jobs)), 1, 16, np.stack([picture_of(job.seed) for job in batch.jobs]))
        while not self.gate.wait(0.01):
            if batch.given_up:
                self.batches[-1] = "stopped"
                raise GivenUp
        if any(job.seed in self.deadly for job in batch.jobs):
            raise WorkerDied("by a test")
        if any(job.seed in self.broken for job in batch.jobs):
            raise RuntimeError("by a test")
        return np.stack([picture_of(job.seed) for job in batch.jobs])

    def kill(self):
        self.gate.set()


@contextlib.contextmanager
def source_of(cards, *workers, **options):
    source = LocalSource(cards, workers, "test", **options)
    source.start()
    try:
        yield source
    finally:
        source.close()
