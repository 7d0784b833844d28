"""The process in which vLLM draws for a server; `vllm_source` starts it in vLLM's own Python environment.

It is given the number of the socket that leads to the server, and talks there in numbers, texts and bytes. When the
socket closes, for whatever reason, it ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import asyncio
import contextlib
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import torch

from autoregressive.serve.vllm_engine import EngineDied, VLLMEngine
from utils.errors import USER_ERRORS


def main(socket: int) -> None:
    """Load the model that the server names, then draw what it asks for, all at once."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends this process
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    line = Connection(socket)
    folder, settings = line.recv()
    try:
        engine = VLLMEngine(folder, **settings)
    except USER_ERRORS as error:
        line.send(("refused", 0, str(error)))
        return
    line.send(("ready", 0, None))
    asyncio.run(_serve(engine, line))


async def _serve(engine: VLLMEngine, line: Connection) -> None:
    """Until the server is gone or the engine is."""
    tasks: dict[int, asyncio.Task[None]] = {}
    try:
        while engine.alive:
            kind, number, content = await asyncio.to_thread(line.recv)
            if kind == "quit":
                break
            if kind == "draw":
                task = tasks[number] = asyncio.create_task(_draw(engine, line, number, content))
                task.add_done_callback(lambda _, number=number: tasks.pop(number, None))
            elif number in tasks:
                tasks[number].cancel()
    except (EOFError, OSError):
        pass  # the server is gone
    finally:
        for task in list(tasks.values()):
            task.cancel()
        await engine.shutdown(timeout=0)


async def _draw(engine: VLLMEngine, line: Connection, number: int, what: dict[str, Any]) -> None:
    subject, settings = what["subject"], what["settings"]
    if "features" in what:  # of a text
        features = torch.frombuffer(bytearray(what["features"]), dtype=torch.float32).view(what["shape"])
        subject = (features, torch.tensor(what["mask"]))
    try:
        async with contextlib.aclosing(engine.draw_codes(subject, **settings)) as images:
            async for codes in images:
                line.send(("codes", number, codes))
    except EngineDied:
        os._exit(1)  # the server starts a new process
    except Exception as error:
        line.send(("failed", number, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
