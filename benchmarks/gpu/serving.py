"""Serving: many clients at one worker with the emoji model of classes, in this process and through the HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import statistics
import time
from pathlib import Path

from autoregressive.serve.batching import LocalSource, local_source
from autoregressive.serve.cards import EMOJI, read_card
from autoregressive.serve.requests import Drawn, Request, Sampling
from benchmarks.gpu.context import Context

_CARD = EMOJI / "emoji-class.json"
_SERVER_NEEDS = ("uvicorn", "starlette", "httpx", "multipart", "prometheus_client")


def run(context: Context) -> None:
    """Without HTTP, then with it where the packages are there."""
    with context.attempt("worker"):
        worker(context)
    missing = [name for name in _SERVER_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        context.record("server", skipped=f"not installed here: {', '.join(missing)}")
    elif context.seconds_left < 12:
        context.record("server", skipped=f"{context.seconds_left:.0f} s left")
    else:
        with context.attempt("server"):
            server(context)


def _load(context: Context) -> tuple[int, int]:
    """Clients, and requests of each."""
    return (16, 4) if not context.tiny else (2, 1)


def _workers(context: Context) -> int:
    """One process; in the tiny run 0, a thread, which starts in no time."""
    return 1 if not context.tiny else 0


def worker(context: Context) -> None:
    """Clients that ask a worker process for one image after another; nothing of HTTP and PNG is in here."""
    clients, requests = _load(context)
    began = time.perf_counter()
    source = local_source([read_card(_CARD)], device=context.device.type, workers=_workers(context))
    with contextlib.closing(source):
        ready = time.perf_counter()
        sizes: list[int] = []
        # the first images of each size of a batch prepare it; the second run is the one that counts
        asyncio.run(asyncio.wait_for(_clients(source, clients, requests, seed=0), max(context.seconds_left - 8, 5)))
        warm = time.perf_counter()
        source.observe = lambda model, size, seconds: sizes.append(size)
        seconds = asyncio.run(_clients(source, clients, requests, seed=10_000))
        duration = time.perf_counter() - warm
    context.record("worker", clients=clients, requests=len(seconds), images_per_s=len(seconds) / duration,
                   **_percentiles(seconds), mean_batch=statistics.mean(sizes), ready_seconds=ready - began,
                   warm_up_seconds=warm - ready, where=source.where)  # fmt: skip
    context.check("worker: all answered", len(seconds) == clients * requests and source.restarts == 0)


async def _clients(source: LocalSource, clients: int, requests: int, seed: int) -> list[float]:
    """Seconds of each request; every client sends its next one when it has its image."""
    card = next(iter(source.cards.values()))

    async def one(number: int) -> list[float]:
        seconds = []
        for i in range(requests):
            started = time.perf_counter()
            request = Request(card.name, number % 90, Sampling(**card.sampling), seed + number * requests + i)
            async with contextlib.aclosing(source.draw(request)) as events:
                images = [event async for event in events if isinstance(event, Drawn)]
            seconds += [time.perf_counter() - started] * len(images)
        return seconds

    return [s for found in await asyncio.gather(*map(one, range(clients))) for s in found]


def server(context: Context) -> None:
    """The server as a process of its own on a free port, and clients over HTTP."""
    from benchmarks.serving_load import load, numbers, started

    clients, requests = _load(context)
    flags = ["--card", str(Path(_CARD)), "--workers", str(_workers(context)), "--backend", "local"]
    flags += ["--device", context.device.type]
    with started("bundled", flags) as url:
        asyncio.run(load(url, clients, requests, 1))
        before = numbers(url)
        seen = asyncio.run(load(url, clients, requests, 1, 10_000))
        after = numbers(url)
    images, batches = (after[name] - before[name] for name in ("llamagen_batch_pictures_sum",
                                                               "llamagen_batch_pictures_count"))  # fmt: skip
    context.record("server", clients=clients, requests=len(seen.seconds), images_per_s=seen.pictures / seen.duration,
                   **_percentiles(seen.seconds), mean_batch=images / max(batches, 1))  # fmt: skip
    context.check("server: all answered", len(seen.seconds) == clients * requests and not seen.lost,
                  outcomes={str(key): count for key, count in seen.outcomes.items()})  # fmt: skip


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{share}_seconds": ordered[min(share * len(ordered) // 100, len(ordered) - 1)] for share in (50, 95)}
