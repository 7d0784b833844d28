"""How commands end: a user's mistake gives one clear sentence and exit code 2, a bug gives a traceback."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from utils.distributed import read_launch

REQUEUE = 75  # sysexits' EX_TEMPFAIL: everything is saved, the same command continues

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class Interrupted(Exception):
    """A signal ended the work in good order; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def run(main: Callable[[], None]) -> None:
    """Run a command's `main` and turn its outcome into an exit code.

    0: done. 2: a user's mistake. 75: SIGTERM or SIGUSR1 came and the state is saved; start the same command again. 130:
    the same after Ctrl-C.

    LLAMAGEN_TRACEBACK=1 shows the full traceback of a user's mistake as well.
    """
    code = 0
    try:
        main()
    except Interrupted as stop:
        code = 130 if stop.signum == signal.SIGINT else REQUEUE
    except KeyboardInterrupt:
        code = 130
    except USER_ERRORS as error:
        if os.environ.get("LLAMAGEN_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {_sentence(error)}", file=sys.stderr, flush=True)
        code = 2
    _exit(code)


def _exit(code: int) -> None:
    """End this process. One of several ends at once: threads of torch.distributed that are still there when Python
    takes itself apart abort a process now and then, whose work is done, and torchrun calls that a failure."""
    if read_launch().world_size > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _sentence(error: Exception) -> str:
    """What the error says; of one from a loader process the last line, where the reason stands."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rstrip().splitlines()[-1].split(": ", 1)[-1]
    return text
