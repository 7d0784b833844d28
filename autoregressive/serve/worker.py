"""The process of one worker; the server starts it (`ProcessWorker`), nobody else.

Its argument is the number of the socket that leads to the server. When that closes, for whatever reason, it ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import contextlib
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from autoregressive.serve.workers import GivenUp, Hand
from utils.errors import USER_ERRORS


def main(socket: int) -> None:
    """Load what the server says, then draw batch after batch."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends its workers when they have finished
        signal.signal(number, signal.SIG_IGN)
    line = Connection(socket)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone
        try:
            hand = Hand(*line.recv())
        except USER_ERRORS as error:
            line.send(("refused", str(error)))
            return
        line.send(("ready", hand.engines))
        while True:
            kind, jobs = line.recv()
            if kind == "draw":  # else it is a "stop" for a batch that was ready when it came
                line.send(_outcome(hand, jobs, line))


def _outcome(hand: Hand, jobs: list[Any], line: Connection) -> tuple[str, Any]:
    def tell(*report: Any) -> None:
        if line.poll() and line.recv()[0] == "stop":
            raise GivenUp
        line.send(("progress", report))

    try:
        return "drawn", hand.draw(jobs, tell)
    except GivenUp:
        return "stopped", None
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception:
        if torch.cuda.is_initialized():  # a GPU may refuse all work after an error: begin anew
            raise
        return "failed", traceback.format_exc()


if __name__ == "__main__":
    main(int(sys.argv[1]))
