"""Compiles the C++ decoding step on first use and keeps it in a cache folder.

The library is made for the processor it is compiled on, so its name holds a hash of the source, the compiler, the flags
and the processor: a home folder shared by different machines is no trouble. `LLAMAGEN_CACHE` moves the folder, `CXX`
names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).with_name("decode_step.cpp")
HEADERS = [SOURCE.with_name(name) for name in ("draw.h", "threads.h", "vectors.h")]
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno")
NATIVE = ("-march=native",)
_SECONDS = 300


class CannotCompile(ValueError):
    """There is no C++ compiler here, or it refuses the source."""


def cache_folder() -> Path:
    """Where compiled libraries live: $LLAMAGEN_CACHE, or `llamagen` in the user's cache folder."""
    if own := os.environ.get("LLAMAGEN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen"


def processor() -> str:
    """What distinguishes this processor from others: its kind, model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in lines if line.startswith(("model", "flags", "Features", "CPU part")))


@functools.cache
def load(machine: tuple[str, ...] = NATIVE) -> tuple[ctypes.CDLL, float]:
    """The library and the seconds that compiling took, 0 if it was there already.

    `machine` are the compiler's flags for the processor.

    Raises:
        CannotCompile: with the reason in one sentence.
    """
    compiler = _compiler()
    command = [compiler, *FLAGS, *machine]
    parts = [*(source.read_text() for source in (SOURCE, *HEADERS)), *command, _version(compiler), processor()]
    library = cache_folder() / f"decode_step-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    seconds = 0.0
    if not library.is_file():
        started = time.perf_counter()
        _compile(command, library)
        seconds = time.perf_counter() - started
    try:
        return ctypes.CDLL(str(library)), seconds
    except OSError as error:
        raise CannotCompile(f"{library} cannot be loaded: {error}") from error


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if path := shutil.which(name):
            return path
    raise CannotCompile("no C++ compiler found (looked for $CXX, g++, clang++, c++)")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _compile(command: list[str], library: Path) -> None:
    """Compile into a temporary file beside `library` and move it there, whole; processes may race."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            subprocess.run(
                [*command, "-o", str(made), str(SOURCE)], check=True, capture_output=True, text=True, timeout=_SECONDS
            )
            os.replace(made, library)
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
        raise CannotCompile(f"{command[0]} cannot compile {SOURCE.name}: {first}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{SOURCE.name} cannot be compiled into {library.parent}: {error}") from error
