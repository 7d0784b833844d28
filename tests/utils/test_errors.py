"""How commands end."""

import subprocess
import sys

import pytest

from tests.commands.shell import ROOT, environment
from utils.errors import Interrupted, run


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("no such class"), 2), (FileNotFoundError("x"), 2), (Interrupted(15), 75), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error, code):
    with pytest.raises(SystemExit) as stop:
        run(failing(error))
    assert stop.value.code == code


def test_a_users_mistake_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        run(failing(ValueError("no such class")))
    assert capsys.readouterr().err == "error: no such class\n"


def test_an_error_from_a_loader_process_says_its_reason_alone(capsys):
    place = 'Original Traceback (most recent call last):\n  File "x"\n'
    text = f"Caught ValueError in DataLoader worker process 0.\n{place}ValueError: bad.png: broken\n"
    with pytest.raises(SystemExit):
        run(failing(ValueError(text)))
    assert capsys.readouterr().err == "error: bad.png: broken\n"


@pytest.mark.parametrize(("processes", "printed"), [(1, "done\nat exit\n"), (2, "done\n")])
def test_one_of_several_processes_ends_at_once(processes, printed):
    code = "import atexit; from utils.errors import run; atexit.register(print, 'at exit'); run(lambda: print('done'))"
    env = {**environment(), "RANK": "0", "WORLD_SIZE": str(processes)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, printed)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        run(failing(KeyError("bug")))
