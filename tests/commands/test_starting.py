"""Every command starts by its path from any folder, without the root in a path variable, and as a module."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.commands.shell import ROOT, environment

FOLDERS = ("autoregressive", "benchmarks", "dataset", "evaluations", "language", "tokenizer", "tools")
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if "serve" not in path.parts and 'if __name__ == "__main__":' in path.read_text()
)
# Starts one after the other as Python would, with the script's folder first on the path (or the root, for a module),
# in one process: most of a command's start is importing torch. Says where the root is missing from the path afterwards.
STARTER = """
import os, runpy, sys
root, way, *scripts = sys.argv[1:]
for script in scripts:
    path = os.path.join(root, script)
    sys.argv, sys.path[0] = [path, "--help"], os.path.dirname(path) if way == "path" else root
    print(f"\\n== {script}")
    try:
        if way == "path":
            runpy.run_path(path, run_name="__main__")
        else:
            runpy.run_module(script[:-3].replace("/", "."), run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, (script, end.code)
    assert sys.path[0] == root, f"{script} left {sys.path[0]} on the path"
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["path", "module"])
def test_every_command_shows_its_help(tmp_path, way):
    (tmp_path / "diffusers.py").write_text("raise ImportError")  # an optional package: nothing needs it to start
    line = [sys.executable, "-c", STARTER, str(ROOT), way, *COMMANDS]
    env = {**environment(), "COLUMNS": "200", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    found = dict(part.split("\n", 1) for part in done.stdout.split("\n== ")[1:])
    assert list(found) == COMMANDS and len(COMMANDS) > 40
    for script, text in found.items():
        assert text.startswith("usage: ") and "show this help" in text, script
