"""Recording steps as CUDA graphs, and keeping the host in step with the device that replays them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], None]

_WARM_UPS = 3  # the first compiles and loads kernels, the next ones settle work space
_STEPS_AHEAD = 32


class CudaGraphs:
    """Records steps on one stream and in one pool of memory, which lives as long as one of the graphs does."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def forget(self) -> None:
        """Call when the recorded graphs are dropped: a pool without graphs cannot be recorded into again."""
        self._pool = None

    def record(self, step: Step, rewind: Step) -> Step:
        """What replays `step`, or `step` itself where it cannot be recorded; `rewind` undoes one run of it.

        The warm-ups run on the stream that records: the work space of matrix products is kept by stream, and one that
        was made while recording would hold on to the pool.
        """
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                step()
                rewind()
        torch.cuda.synchronize()
        try:
            return self._recorded(step)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logging.getLogger("llamagen").warning("steps run without a CUDA graph: %s", error)
            return step
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _recorded(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        self._pool = graph.pool()
        return graph.replay


class Pace:
    """Keeps the host at most 32 steps ahead of a GPU, so that progress is what was computed and stopping stops."""

    def __init__(self, device: torch.device) -> None:
        self._events: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None

    def __call__(self) -> None:
        """Call after each step has been queued."""
        if self._events is None:
            return
        if len(self._events) == _STEPS_AHEAD:
            self._events.popleft().synchronize()
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
