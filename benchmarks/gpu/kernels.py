"""Triton kernels of a decode step: every check of their tests with this device, and the tests that need a GPU."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from benchmarks.gpu.context import Context

TESTS = "tests.autoregressive"
MODULES = (
    "engine.kernels.test_sampler",
    "engine.kernels.test_attention",
    "models.test_loss",
    "engine.test_fused",
    "engine.kernels.test_linear",
)
TINY = MODULES[:3]  # those that are interpreted in a few seconds
GPU_TESTS = (
    "tests/autoregressive/train/test_on_gpu.py",
    "tests/autoregressive/engine/test_static.py",
    "tests/utils/test_distributed.py",
)
RESERVE_S = 4.0  # seconds before the section's end at which a check is ended
START_S = 8.0  # what a check needs at least, as it imports everything
LONGEST_S = 40.0  # what a check may take: one that is ended after less had no time, one that is ended after more hangs
AT_A_TIME = 14  # most of a check is compiling, on one core


def run(context: Context) -> None:
    """All checks, each in a process of its own, many at a time on a GPU."""
    interpret_on_cpu(context)
    jobs = []
    if context.device.type == "cuda":
        jobs.append(partial(run_gpu_tests, context))
    for name in MODULES if not context.tiny else TINY:
        tests = importlib.import_module(f"{TESTS}.{name}")
        checks = [key for key, _ in inspect.getmembers(tests, inspect.isfunction) if key.startswith("check_")]
        context.check(f"{name}: has checks", bool(checks), checks=checks)
        jobs += [partial(run_check, context, name, key) for key in (checks[-1:] if context.tiny else checks)]
        if context.device.type == "cuda" and name == "engine.test_fused":
            jobs += [partial(run_check, context, name, key, dependent=True) for key in checks]
    with ThreadPoolExecutor(AT_A_TIME if context.device.type == "cuda" else 1) as pool:
        for job in [pool.submit(job) for job in jobs]:
            job.result()


def interpret_on_cpu(context: Context) -> None:
    """Have Triton interpret its kernels where there is no GPU; before anything imports triton."""
    if context.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def run_check(context: Context, module: str, function: str, dependent: bool = False) -> None:
    """Call one check with the device; `dependent`: with kernels that start while the one before them ends."""
    code = f"import {TESTS}.{module} as tests; tests.{function}('{context.device.type}')"
    name = f"{module}: {function}" + ", dependent launches" * dependent
    run_command(context, name, [sys.executable, "-c", code], {"LLAMAGEN_DEPENDENT_LAUNCH": "1"} if dependent else {})


def run_gpu_tests(context: Context) -> None:
    """The tests that are skipped without a GPU."""
    options = ["-q", "-p", "no:cacheprovider", "-k", "gpu or graphs or device or finite or cpu"]
    run_command(context, "tests that need a GPU", [sys.executable, "-m", "pytest", *options, *GPU_TESTS])


def run_command(context: Context, name: str, command: list[str], variables: Mapping[str, str] | None = None) -> None:
    """Run a command and note whether it ended well, else the end of what it printed; it is left out without time."""
    started, limit = time.perf_counter(), context.seconds_left - RESERVE_S
    if not context.has_time(name, RESERVE_S + START_S):
        return
    try:
        environment = {**os.environ, **(variables or {})}
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        error = "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]
    except subprocess.TimeoutExpired:
        if limit < LONGEST_S:
            context.record(name, skipped=f"no time was left after {limit:.0f} s")
            return
        error = f"ended after {limit:.0f} s"
    seconds = round(time.perf_counter() - started, 1)
    context.check(name, not error, seconds=seconds, **({"error": error} if error else {}))
