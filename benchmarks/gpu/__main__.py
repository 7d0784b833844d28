"""Checks and times everything that runs on a GPU, in one go and within a time budget.

    python3 -m benchmarks.gpu --out results-gpu                     everything, at most 520 seconds
    python3 -m benchmarks.gpu --out results-gpu --sections decode training
    python3 -m benchmarks.gpu --out /tmp/gpu --device cpu --tiny    every line, on a CPU, in about three minutes

Each section is a process of its own with a time limit; what it finds is appended to DIR/records.jsonl at once, and a
section that fails or is ended does not stop the others. At the end DIR/results.json holds all of it together with the
hardware, versions and commit, and DIR/results.md the tables. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.report import markdown, summary
from benchmarks.gpu.sections import SECTIONS, Section
from utils.args import make_parser
from utils.errors import run

AT_A_TIME = 5  # sections in which nothing is timed
THREADS = 4  # of each of them for what it computes on the CPU, unless OMP_NUM_THREADS says otherwise


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--out", type=Path, required=True, help="folder of the results")
    flags.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    flags.add_argument(
        "--sections", nargs="+", choices=[s.name for s in SECTIONS], help="run these alone; default: all"
    )
    flags.add_argument("--device", default="cuda", help="cuda or cpu")
    flags.add_argument("--tiny", action="store_true", help="smallest sizes: tests this program, measures nothing")
    flags.add_argument("--section", choices=[s.name for s in SECTIONS], help=argparse.SUPPRESS)
    flags.add_argument("--limit", type=float, default=60.0, help=argparse.SUPPRESS)
    return flags


def main() -> None:
    """Run one section in this process, or all of them in processes of their own."""
    args = parser().parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU here; --device cpu --tiny runs the program without one")
    if args.section:
        context = Context(args.section, device, args.out, args.tiny, args.limit)
        importlib.import_module(f"benchmarks.gpu.{args.section}").run(context)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "records.jsonl").write_text("")
    run_all([s for s in SECTIONS if not args.sections or s.name in args.sections], args)
    results = summary(args.out, device)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "results.md").write_text(markdown(results))
    print(markdown(results))
    sys.exit(int(any(record.get("passed") is False for record in results["records"])))


def run_all(sections: Sequence[Section], args: argparse.Namespace) -> None:
    """Run `sections` within the budget: those without timing several at a time, the timed ones alone, in order.

    Where the budget is too small for all limits, those of the timed sections shrink alike.
    """
    deadline = time.monotonic() + args.budget
    timed = sum(section.seconds for section in sections if section.timed)
    untimed = max((section.seconds for section in sections if not section.timed), default=0.0)
    share = min(1.0, max(args.budget - untimed, 0.0) / max(timed, 1.0))
    with ThreadPoolExecutor(AT_A_TIME if not args.tiny else 1) as pool:
        waiting = []
        for section in sections:
            if section.timed:
                [job.result() for job in waiting]
                waiting = []
                run_apart(section, args, deadline, section.seconds * share)
            else:
                waiting.append(pool.submit(run_apart, section, args, deadline, section.seconds))
        [job.result() for job in waiting]


def run_apart(section: Section, args: argparse.Namespace, deadline: float, seconds: float) -> None:
    """Run one section as a process; its output goes to a log, its end and its seconds to the records."""
    context = Context(section.name, torch.device(args.device), args.out)
    limit = min(seconds if not args.tiny else 600.0, deadline - time.monotonic())
    if limit < 5:
        context.check("ran", False, error="no time was left")
        return
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", section.name, "--out", str(args.out)]
    command += ["--device", args.device, "--limit", f"{limit:.0f}", *["--tiny"] * args.tiny]
    environment = dict(os.environ) if section.timed else {"OMP_NUM_THREADS": str(THREADS), **os.environ}
    started = time.monotonic()
    with (args.out / f"{section.name}.log").open("w") as log:
        try:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
            code = subprocess.run(command, timeout=limit + 2, **options).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = round(time.monotonic() - started, 1)
    error = f"ended at its limit of {limit:.0f} s" if code is None else _last_lines(args.out, section) if code else ""
    context.check("ran", code == 0, seconds=seconds, **({"error": error} if error else {}))


def _last_lines(out: Path, section: Section) -> str:
    return "\n".join((out / f"{section.name}.log").read_text(errors="replace").splitlines()[-12:])


if __name__ == "__main__":
    run(main)
