"""Pictures of one model whose codes vLLM draws, in a process in vLLM's own Python environment.

Texts become conditions and codes pictures in this process. Each slot is a worker of `batching.LocalSource` that draws
one picture at a time; vLLM draws those of all slots together, whatever their settings are.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.sample.pipeline import make_decoder
from autoregressive.sample.text import TextConditions
from autoregressive.serve.batching import LocalSource
from autoregressive.serve.cards import Card, card_parser
from autoregressive.serve.export import export_checkpoint
from autoregressive.serve.requests import BadRequest, Event, Request
from autoregressive.serve.studio import Job, partial_pictures
from autoregressive.serve.workers import Batch, GivenUp, WorkerDied
from tokenizer.build import load_tokenizer
from utils.distributed import process_group
from utils.image import to_uint8

_ROOT = Path(__file__).resolve().parents[2]
_COMMAND = Path(__file__).with_name("vllm_worker.py")
_LAST_SECONDS = 10.0  # for vLLM to end by itself
_ASKED = 2  # times to tell a process of a picture, should it be gone
_PREVIEW_SECONDS = 0.5  # between two previews of a picture
# flags of samplers that vLLM has no counterpart of here
_LOCAL_FLAGS = (
    "cfg_start", "cfg_schedule", "min_p", "temperature_end", "quantize", "kv_cache_dtype", "negative_prompt",
    "no_left_padding",
)  # fmt: skip


def vllm_python() -> str | None:
    """The Python that has vLLM: this one, or that of the environment which scripts/setup_vllm.sh makes; None: none."""
    if find_spec("vllm") is not None:
        return sys.executable
    venv = _ROOT / os.environ.get("VENV_VLLM", ".venv-vllm")
    return str(venv / "bin/python") if any(venv.glob(".llamagen-*")) else None


def why_not(card: Card) -> str | None:
    """What of a model's flags vLLM cannot do; None if it can do everything."""
    defaults = card_parser(card.kind).parse_args([])
    other = [name for name in _LOCAL_FLAGS if getattr(card.args, name) != getattr(defaults, name)]
    return f"vLLM has no --{other[0].replace('_', '-')}" if other else None


class _Engine:
    """vLLM's process, started again when it is gone. Messages of a picture go into a queue of its own."""

    def __init__(self, python: str, folder: Path, settings: dict[str, Any]) -> None:
        self._python, self._order = python, (str(folder), settings)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        self._queues: dict[int, queue.SimpleQueue[Any]] = {}
        self._alive = self._ended = False
        self.starts = 0

    @property
    def alive(self) -> bool:
        return self._alive

    def start(self) -> None:
        """Unless it runs, start it and wait until it is ready."""
        with self._lock:
            if self._alive:
                return
            if self._ended:
                raise WorkerDied("vLLM was ended")
            self._end()
            self._line, theirs = multiprocessing.Pipe()
            command = [self._python, str(_COMMAND), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
            theirs.close()
            try:
                self._line.send(self._order)
                kind, _, content = self._line.recv()
            except (EOFError, OSError) as error:
                raise WorkerDied("vLLM ended while it loaded the model; its output says why") from error
            if kind != "ready":
                self._end()
                raise ValueError(content)
            self._alive, self._queues = True, {}
            self.starts += 1
            threading.Thread(target=self._listen, args=(self._line, self._queues), daemon=True).start()

    def _listen(self, line: Any, queues: dict[int, queue.SimpleQueue[Any]]) -> None:
        try:
            while True:
                kind, number, content = line.recv()
                if (waiting := queues.get(number)) is not None:
                    waiting.put((kind, content))
        except (EOFError, OSError):
            with self._lock:
                if line is self._line:  # else there is a new process already
                    self._alive = False
            for waiting in list(queues.values()):
                waiting.put(("died", None))

    def ask(self, what: dict[str, Any]) -> tuple[int, queue.SimpleQueue[Any]]:
        """Begin a picture; what vLLM says of it comes into the queue.

        A process that was gone before it heard of the picture is started again: that is not the picture's fault.
        """
        number, messages = next(self._numbers), queue.SimpleQueue()
        for _ in range(_ASKED):
            self.start()
            with self._lock:
                self._queues[number] = messages
                if self._send(("draw", number, what)):
                    return number, messages
        raise WorkerDied("vLLM's process is gone")

    def forget(self, number: int) -> None:
        """Stop a picture, if it is not ready."""
        with self._lock:
            if self._queues.pop(number, None) is not None:
                self._send(("stop", number, None))

    def _send(self, message: Any) -> bool:
        """Whether the process could be told."""
        if self._alive:
            try:
                self._line.send(message)
            except OSError:
                self._alive = False
        return self._alive

    def kill(self) -> None:
        """End it and the processes that it started, by force if it does not end by itself."""
        with self._lock:
            self._ended = True
            self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        self._alive = False
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._line.send(("quit", 0, None))
            self._process.wait(_LAST_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


class _Turns:
    """Who may be in the engine: pictures together, or one that went wrong before, alone."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._inside = self._waiting_alone = 0
        self._alone = False

    @contextlib.contextmanager
    def turn(self, batch: Batch) -> Iterator[None]:
        """Wait for it, and have it. Raises GivenUp when nobody wants the picture any more."""
        alone = batch.again
        with self._change:
            self._waiting_alone += alone
            try:
                while self._alone or (self._inside if alone else self._waiting_alone):
                    if batch.given_up:
                        raise GivenUp
                    self._change.wait(0.1)
            finally:
                self._waiting_alone -= alone
            self._inside += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._change:
                self._inside -= 1
                self._alone = False
                self._change.notify_all()


class _Parts:
    """What is done in this process: texts to conditions, codes to pictures."""

    def __init__(self, card: Card, device: torch.device) -> None:
        self.text = TextConditions(card.args, device) if card.kind == "t2i" else None
        tokenizer = load_tokenizer(card.args, device)
        self.codebook_size = tokenizer.config.codebook_size
        self.decode = make_decoder(card.args, tokenizer, batch_size=1)
        self.decode.warm_up(card.grid**2)
        self.device, self._lock = device, threading.Lock()

    def condition(self, job: Job) -> dict[str, Any]:
        """What `vllm_worker` is told of a job's subject."""
        if self.text is None:
            return {"subject": job.subject}
        with self._lock:
            features, mask = self.text.encode([str(job.subject)])
        if not mask.any():
            raise BadRequest("the prompt holds no text", "prompt")
        content = features[0].float().cpu()
        return {"subject": None, "features": content.numpy().tobytes(), "shape": tuple(content.shape),
                "mask": mask[0].tolist()}  # fmt: skip

    def picture(self, codes: list[int]) -> np.ndarray:
        """The picture (1, edge, edge, 3) of all its codes."""
        with self._lock:
            return to_uint8(self.decode(torch.tensor([codes], device=self.device))).cpu().numpy()

    def preview(self, codes: list[int], total: int) -> np.ndarray | None:
        """The picture (1, edge, edge, 3) of the codes that are there, grey where none are; None: no time for that."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            padded = torch.tensor([codes + codes[-1:] * (total - len(codes))], dtype=torch.int32, device=self.device)
            return partial_pictures(self.decode, padded, len(codes))
        finally:
            self._lock.release()


class _Slot:
    """A worker that draws one picture at a time; the engine is shared."""

    def __init__(self, engine: _Engine, turns: _Turns, parts: _Parts, total: int) -> None:
        self._engine, self._turns, self._parts, self._total = engine, turns, parts, total
        self.engines = {"": "vLLM"}

    def start(self) -> None:
        """Start the engine, if no other slot has."""
        self._engine.start()

    def draw(self, batch: Batch) -> np.ndarray:
        """The picture of the only job."""
        job = batch.jobs[0]
        what = {**self._parts.condition(job), "settings": {"seed": job.seed, **vars(job.sampling)}}
        with self._turns.turn(batch):
            number, messages = self._engine.ask(what)
            try:
                codes = self._follow(batch, job, messages)
            finally:
                self._engine.forget(number)
        return self._parts.picture(codes)

    def _follow(self, batch: Batch, job: Job, messages: queue.SimpleQueue[Any]) -> list[int]:
        """All codes of a picture, telling of them as they come."""
        next_preview = 0.0
        while True:
            if batch.given_up:
                raise GivenUp
            try:
                kind, content = messages.get(timeout=0.1)
            except queue.Empty:
                continue
            if kind == "died":
                raise WorkerDied("vLLM's process is gone")
            if kind == "failed":
                raise RuntimeError(content)
            if len(content) == self._total:
                return content
            preview = None
            if job.previews and time.monotonic() > next_preview:
                preview = self._parts.preview(content, self._total)
                next_preview = time.monotonic() + _PREVIEW_SECONDS
            batch.tell(range(1), len(content), self._total, preview)

    def kill(self) -> None:
        """Nothing: the engine is everybody's, the source ends it."""


class VLLMSource(LocalSource):
    """A `LocalSource` whose slots share one engine; it does not edit."""

    def __init__(self, card: Card, engine: _Engine, parts: _Parts, slots: int) -> None:
        turns = _Turns()
        workers = [_Slot(engine, turns, parts, card.grid**2) for _ in range(slots)]
        super().__init__([card], workers, str(parts.device), 1)
        self._engine = engine

    @property
    def restarts(self) -> int:
        """How often vLLM was started again."""
        return max(self._engine.starts - 1, 0)

    @property
    def workers(self) -> tuple[int, int]:
        """Whether vLLM is ready, of one."""
        return int(self._engine.alive), 1

    def draw(self, request: Request) -> AsyncIterator[Event]:
        """See `Source`."""
        if request.edit is not None:
            raise BadRequest("pictures cannot be edited on vLLM; serve with --backend local for that", "image")
        return super().draw(request)

    def close(self, grace: float = 0) -> None:
        """As in `LocalSource`."""
        super().close(grace)
        self._engine.kill()


def vllm_source(card: Card, *, device: str | None = None, max_batch_size: int = 16) -> VLLMSource:
    """Load the model of `card` into vLLM and return it as a `Source`, started; `close` it in the end.

    `device` is that of the tokenizer and the text encoder; vLLM works on what it was built for. It draws up to
    `max_batch_size` pictures at once.

    Raises:
        ValueError: vLLM is not installed, cannot do what the card's flags say, or the checkpoint does not fit.
    """
    python = vllm_python()
    if python is None:
        raise ValueError("vLLM is not installed: bash scripts/setup_vllm.sh, or --backend local")
    if reason := why_not(card):
        raise ValueError(f"{reason}; use --backend local")
    with process_group(device or card.args.device) as chosen:
        parts = _Parts(card, chosen)
    folder = export_checkpoint(card.args, parts.codebook_size)
    settings = {"cfg_interval": card.args.cfg_interval, "max_images": max_batch_size}
    engine = _Engine(python, folder, settings)
    engine.start()  # before its slots, which would try again and again
    source = VLLMSource(card, engine, parts, max_batch_size)
    source.start()
    return source
