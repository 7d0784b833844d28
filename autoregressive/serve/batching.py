"""Pictures drawn on this machine: requests of many users, in batches, by workers that may die.

A request is cut into jobs, one for each picture. A worker that has nothing to do takes the next batch of jobs with
equal settings (`waiting.FairQueue`) at once; it never waits for company. A picture depends on its seed alone, so nobody
can tell with whom it was drawn, and a batch that was lost with its worker is simply drawn again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from autoregressive.serve.cards import Card
from autoregressive.serve.requests import BadRequest, Drawn, Event, Failed, Progress, Request, Unavailable
from autoregressive.serve.studio import Job
from autoregressive.serve.waiting import FairQueue
from autoregressive.serve.workers import GivenUp, ProcessWorker, ThreadWorker, Worker, WorkerDied
from utils.args import cpu_cores

_TRIES = 2  # of a job, when its worker dies or fails
_STARTS = 5  # of a worker in a row
_LAST_SECONDS = 2.0  # for a batch that is told to stop, before its worker is killed

Observer = Callable[[str, int, float], None]  # model, size and seconds of a batch

_log = logging.getLogger("llamagen")


class _Call:
    """A request under way. Workers put its events in, from their threads; one event loop reads them.

    At most one event of each picture is kept, so a reader that is slow costs no memory.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.given_up = self.begun = False
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._lock = threading.Lock()
        self._events: dict[int, Event] = {}
        self._error: Failed | BadRequest | None = None

    def post(self, event: Event) -> None:
        """Put an event in, in the place of an older one of that picture."""
        with self._lock:
            older = self._events.get(event.number)
            if isinstance(event, Progress) and event.preview is None and isinstance(older, Progress):
                event = replace(event, preview=older.preview)
            self._events[event.number] = event
            asleep = len(self._events) == 1
        if asleep:
            self._wake()

    def fail(self, error: Failed | BadRequest) -> None:
        """End the request with an error."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop is closed
            self.given_up = True

    async def next(self) -> Event:
        """The next event, or the error that ended the request."""
        while True:
            self._ready.clear()
            with self._lock:
                if self._events:
                    return self._events.pop(next(iter(self._events)))
            if self._error is not None:
                raise self._error
            await self._ready.wait()


@dataclass(eq=False)
class _Ticket:
    """Picture `number` of a call, waiting or being drawn."""

    job: Job
    call: _Call
    number: int
    tries: int = 0

    @property
    def key(self) -> Any:
        """Tickets with equal keys may share a batch. One whose batch went wrong is drawn alone, to find the culprit."""
        return (self.job.key, id(self)) if self.tries else self.job.key


class _Batch:
    """Tickets that a worker draws together."""

    def __init__(self, tickets: list[_Ticket]) -> None:
        self.tickets = tickets
        self.jobs = [ticket.job for ticket in tickets]
        self.called_off = False

    @property
    def given_up(self) -> bool:
        return self.called_off or all(ticket.call.given_up for ticket in self.tickets)

    @property
    def again(self) -> bool:
        return self.tickets[0].tries > 0

    def tell(self, rows: range, done: int, total: int, previews: np.ndarray | None) -> None:
        for row, ticket in enumerate(self.tickets[rows.start : rows.stop]):
            preview = previews[row] if previews is not None and ticket.job.previews else None
            ticket.call.post(Progress(ticket.number, done, total, preview))


class LocalSource:
    """A `Source` of workers on this machine. May be used from several event loops and threads.

    `start` it before use, `close` it after.
    """

    def __init__(self, cards: Sequence[Card], workers: Sequence[Worker], where: str, max_batch_size: int = 16) -> None:
        self.cards = {card.name: card for card in cards}
        self.where = where
        self._restarts = 0
        self.observe: Observer = lambda model, size, seconds: None
        self._workers = list(workers)
        self._limit = max_batch_size
        self._queue: FairQueue[_Ticket] = FairQueue()
        self._change = threading.Condition()
        self._running: dict[Worker, _Batch | None] = {}  # of the workers that are ready
        self._given_up_on = 0
        self._closing = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start all workers and wait until they are ready.

        Raises:
            ValueError: they cannot load the models.
        """
        outcomes: list[Future[None]] = [Future() for _ in self._workers]
        for worker, outcome in zip(self._workers, outcomes):
            thread = threading.Thread(target=self._serve, args=(worker, outcome), name="worker", daemon=True)
            self._threads.append(thread)
            thread.start()
        try:
            for outcome in outcomes:
                outcome.result()
        except BaseException:
            self.close()
            raise
        engines = sorted({engine for worker in self._workers for engine in getattr(worker, "engines", {}).values()})
        self.where = ", ".join([self.where, *engines])

    @property
    def restarts(self) -> int:
        """How often a worker was started again."""
        return self._restarts

    @property
    def waiting(self) -> int:
        """Pictures that no worker has begun."""
        with self._change:
            return len(self._queue)

    @property
    def workers(self) -> tuple[int, int]:
        """Workers that are ready, and all there should be."""
        with self._change:
            return len(self._running), len(self._workers)

    def draw(self, request: Request) -> AsyncIterator[Event]:
        """See `Source`."""
        if request.model not in self.cards:
            raise BadRequest(f"there is no model {request.model}; there are: {', '.join(self.cards)}", "model")
        request.check(self.cards[request.model])
        return self._events(request)

    async def _events(self, request: Request) -> AsyncIterator[Event]:
        call = _Call(request)
        self._enqueue(call)
        try:
            drawn = 0
            while drawn < request.n:
                event = await call.next()
                drawn += isinstance(event, Drawn)
                yield event
        finally:
            call.given_up = True
            with self._change:
                self._queue.drop(call)

    def _enqueue(self, call: _Call) -> None:
        request = call.request
        what = (request.model, request.subject, request.sampling)
        with self._change:
            if self._closing or self._given_up_on == len(self._workers):
                raise Unavailable("the server is stopping" if self._closing else "no worker is left to draw")
            for number in range(request.n):
                job = Job(*what, request.seed + number, request.edit, request.previews)
                self._queue.put(job.key, call, _Ticket(job, call, number))
            self._change.notify_all()

    def _serve(self, worker: Worker, outcome: Future[None]) -> None:
        """The life of a worker's thread."""
        try:
            worker.start()
        except Exception as error:
            outcome.set_exception(error)
            return
        with self._change:
            self._running[worker] = None
        outcome.set_result(None)
        while (batch := self._next_batch(worker)) is not None:
            if not self._draw(worker, batch) and not self._restart(worker):
                return
        with self._change:
            del self._running[worker]
        worker.kill()

    def _next_batch(self, worker: Worker) -> _Batch | None:
        """Waits for it; None at the end."""
        with self._change:
            self._running[worker] = None
            self._change.notify_all()  # who waits for the end looks again
            while not self._queue:
                if self._closing:
                    return None
                self._change.wait()
            idle = sum(batch is None for batch in self._running.values())
            batch = self._running[worker] = _Batch(self._queue.take(self._limit, idle))
            for ticket in batch.tickets:
                ticket.call.begun = True
            return batch

    def _draw(self, worker: Worker, batch: _Batch) -> bool:
        """Draw and hand out a batch; False when the worker has to be started again."""
        started = time.monotonic()
        try:
            pictures = worker.draw(batch)
        except GivenUp:
            return True
        except BadRequest as error:
            for ticket in batch.tickets:
                ticket.call.fail(error)
            return True
        except WorkerDied as error:
            self._again(batch, error)
            return False
        except Exception as error:
            self._again(batch, error)
            return True
        self.observe(batch.jobs[0].model, len(batch.jobs), time.monotonic() - started)
        for ticket, picture in zip(batch.tickets, pictures):
            ticket.call.post(Drawn(ticket.number, picture))
        return True

    def _again(self, batch: _Batch, error: Exception) -> None:
        """Draw the pictures of a batch that went wrong once more, each alone."""
        _log.error("a batch of %d pictures of %s went wrong: %s", len(batch.jobs), batch.jobs[0].model, error)
        with self._change:
            for ticket in batch.tickets:
                ticket.tries += 1
                if batch.called_off:
                    ticket.call.fail(Unavailable("the server is stopping"))
                elif ticket.tries >= _TRIES:
                    ticket.call.fail(Failed("the picture could not be drawn: drawing it went wrong twice"))
                elif not ticket.call.given_up:
                    self._queue.put(ticket.key, ticket.call, ticket, first=True)
            self._change.notify_all()

    def _restart(self, worker: Worker) -> bool:
        """Start a worker again; False when that fails again and again."""
        with self._change:
            del self._running[worker]
        for attempt in range(_STARTS):
            with self._change:
                self._change.wait_for(lambda: self._closing, timeout=attempt)
                if self._closing and not self._queue:
                    return False
                self._restarts += 1
            try:
                worker.start()
            except Exception as error:
                _log.error("a worker could not be started again: %s", error)
                continue
            _log.warning("a worker was started again")
            return True
        _log.error("a worker could not be started %d times; it is given up on", _STARTS)
        with self._change:
            self._given_up_on += 1
            if self._given_up_on == len(self._workers):
                self._refuse_waiting(Unavailable("no worker is left to draw"))
        return False

    def _refuse_waiting(self, error: Failed, begun: bool = True) -> None:
        """Fail who waits; with `begun`, also those of whom some pictures are drawn or being drawn."""
        for call in self._queue.owners():
            if begun or not call.begun:
                self._queue.drop(call)
                call.fail(error)

    def close(self, grace: float = 0) -> None:
        """Refuse what has not begun, give `grace` seconds to what has, then stop all workers."""
        end = time.monotonic() + grace
        with self._change:
            self._closing = True
            self._refuse_waiting(Unavailable("the server is stopping"), begun=False)
            self._change.notify_all()
        self._join(end)
        with self._change:
            self._refuse_waiting(Unavailable("the server is stopping"))
            for batch in self._running.values():
                if batch is not None:
                    batch.called_off = True
        self._join(time.monotonic() + _LAST_SECONDS)
        for worker in self._workers:
            worker.kill()

    def _join(self, end: float) -> None:
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


def local_source(
    cards: Sequence[Card], *, device: str | None = None, workers: int | None = None, max_batch_size: int = 16
) -> LocalSource:
    """Load the models of `cards` and return them as a `Source`, started; `close` it in the end.

    `device` ("cuda", "cpu") overrides the cards'. There is a worker process for each GPU, or one on a CPU; `workers`
    is their number, 0: a thread of this process, which starts sooner and shares the fate of this process. CPU workers
    share the cores.

    Raises:
        ValueError: settings that mean nothing, or a checkpoint that is missing or does not fit.
    """
    if not cards:
        raise ValueError("there is no model to draw with")
    if len({card.name for card in cards}) < len(cards):
        raise ValueError(f"two models have the same name: {', '.join(card.name for card in cards)}")
    if max_batch_size < 1 or (workers is not None and workers < 0):
        raise ValueError(
            f"a batch has at least one picture, and workers are 0 or more; got {max_batch_size}, {workers}"
        )
    asked = device or cards[0].args.device
    kind = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = max(torch.cuda.device_count(), 1) if kind == "cuda" else 1
    count = gpus if workers is None else max(workers, 1)
    threads = cards[0].args.num_threads or (max(cpu_cores() // count, 1) if count > 1 and kind == "cpu" else None)
    make = ThreadWorker if workers == 0 else ProcessWorker
    devices = [f"cuda:{i % gpus}" if kind == "cuda" and gpus > 1 else kind for i in range(count)]
    number = f"{count} x " if count > 1 else ""
    source = LocalSource(cards, [make(cards, one, threads) for one in devices], number + kind, max_batch_size)
    source.start()
    return source
