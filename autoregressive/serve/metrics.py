"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from autoregressive.serve.requests import Source

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Backend(Source, Protocol):
    """A source with an engine room that can be watched and stopped."""

    @property
    def restarts(self) -> int:
        """How often a worker was started again."""
        ...

    @property
    def waiting(self) -> int:
        """Pictures that no worker has begun."""
        ...

    @property
    def workers(self) -> tuple[int, int]:
        """Workers that are ready, and all there should be."""
        ...

    def observe(self, model: str, size: int, seconds: float) -> None:
        """Set this to hear of every batch."""
        ...

    def close(self, grace: float = 0) -> None:
        """Refuse what has not begun, give `grace` seconds to what has, then stop."""
        ...


class Meter:
    """The numbers of one server, in a registry of its own."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        names = {"registry": self.registry, "namespace": "llamagen"}
        self.requests = Counter("requests", "Requests answered", ["endpoint", "outcome"], **names)
        self.seconds = Histogram(
            "request_seconds", "From a request to the end of its answer", ["endpoint"], buckets=_SECONDS, **names
        )
        self.pictures = Counter("pictures", "Pictures drawn", ["model"], **names)
        self.tokens = Counter("tokens", "Codes of these pictures that were drawn", ["model"], **names)
        self.picture_seconds = Histogram(
            "picture_seconds", "From a request to one of its pictures", ["model"], buckets=_SECONDS, **names
        )
        self.batch_pictures = Histogram("batch_pictures", "Pictures of a batch", ["model"], buckets=_SIZES, **names)
        self.batch_seconds = Histogram("batch_seconds", "Time that a batch took", ["model"], buckets=_SECONDS, **names)
        self.registry.register(_Engines(backend))
        ProcessCollector(registry=self.registry)
        backend.observe = self._batch  # type: ignore[method-assign]

    def _batch(self, model: str, size: int, seconds: float) -> None:
        self.batch_pictures.labels(model).observe(size)
        self.batch_seconds.labels(model).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Engines:
    """Reads the engine room when it is asked."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        ready, all_of_them = self._backend.workers
        yield GaugeMetricFamily("llamagen_waiting_pictures", "Pictures no worker has begun", self._backend.waiting)
        yield GaugeMetricFamily("llamagen_workers", "Workers there should be", all_of_them)
        yield GaugeMetricFamily("llamagen_workers_ready", "Workers that are ready", ready)
        yield CounterMetricFamily("llamagen_worker_restarts", "Workers started again", self._backend.restarts)
