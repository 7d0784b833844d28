"""Runs a check function of a test module in a process whose Triton kernels are interpreted on the CPU."""

import os
import subprocess
import sys


def run_interpreted(module: str, function: str) -> None:
    """Call `module.function()` there; AssertionError with its output if it fails."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    code = f"import {module} as m; m.{function}()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
