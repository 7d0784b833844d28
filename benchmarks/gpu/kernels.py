"""Triton kernels of a decode step: every check of their tests, with this device."""

from __future__ import annotations

import importlib
import inspect
import os
import time

from benchmarks.gpu.context import Context

MODULES = ("sampler", "attention", "linear")
TESTS = "tests.autoregressive.engine.kernels"
RESERVE_S = 4.0  # seconds before the section's end after which no further check begins


def run(context: Context) -> None:
    """The checks of all modules; a module that is not there is a failed check."""
    interpret_on_cpu(context)
    for name in MODULES:
        with context.attempt(name):
            check_module(context, name)


def interpret_on_cpu(context: Context) -> None:
    """Have Triton interpret its kernels where there is no GPU; before anything imports triton."""
    if context.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def check_module(context: Context, name: str) -> None:
    """Call every check of a kernel's test with this device; in the tiny program, whose kernels are slow, the last."""
    try:
        tests = importlib.import_module(f"{TESTS}.test_{name}")
    except ModuleNotFoundError as error:
        context.check(name, False, error=str(error))
        return
    checks = [(key, f) for key, f in inspect.getmembers(tests, inspect.isfunction) if key.startswith("check_")]
    context.check(f"{name}: has checks", bool(checks), checks=[key for key, _ in checks])
    for key, function in checks[-1:] if context.tiny else checks:
        if context.seconds_left < RESERVE_S:
            context.record(f"{name}: {key}", skipped="no time was left")
            continue
        with context.attempt(f"{name}: {key}"):
            started = time.perf_counter()
            function(context.device.type)
            context.check(f"{name}: {key}", True, seconds=round(context.synchronize() - started, 1))
