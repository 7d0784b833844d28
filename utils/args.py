"""Arguments that several commands share, one function per group."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch

from utils.precision import DTYPES
from utils.schedule import SCHEDULES


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of a module docstring and shows each default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.required or not action.help:
            return action.help or ""
        return super()._get_help_string(action) or ""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring above its flags."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)


def add_runtime_args(parser: argparse.ArgumentParser) -> None:
    """Device, threads and seed."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cuda or cpu; the default is a GPU where there is one")
    group.add_argument("--num-threads", type=int, help="CPU threads per process; the default is torch's choice")
    group.add_argument("--num-workers", type=int, default=24, help="loader processes, at most one per CPU core is used")


def add_seed_arg(parser: argparse._ActionsContainer, name: str = "--global-seed", **options: Any) -> None:
    """A seed, by default the base of everything random; `options` are further ones of `add_argument`."""
    parser.add_argument(name, type=_seed, **{"default": 0, "help": "base seed of everything random", **options})


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is a whole number, 0 or more, not {text!r}")
    return int(text)


def add_bad_images_arg(group: argparse._ArgumentGroup) -> None:
    """How many unreadable images a command puts up with."""
    text = "stop when a larger share of the images cannot be read; those up to it are left out and listed"
    group.add_argument("--max-bad-share", type=float, default=0.01, help=text)


def add_lists_args(group: argparse._ArgumentGroup) -> None:
    """Which caption lists a command reads."""
    group.add_argument("--data-path", required=True, help="folder of .jsonl lists")
    group.add_argument("--data-start", type=int, help="first place in the sorted listing of --data-path; default: all")
    group.add_argument("--data-end", type=int, help="last place in it, included")


def add_run_args(parser: argparse.ArgumentParser, results_dir: str) -> None:
    """Where a training run lives, how often it speaks and saves, and whether it continues."""
    group = parser.add_argument_group("run")
    group.add_argument("--results-dir", default=results_dir, help="a numbered folder for each run is made in here")
    group.add_argument("--run-dir", help="use exactly this folder; if it holds checkpoints, training continues")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue an unfinished run of the same settings in --results-dir",
    )
    group.add_argument("--cloud-save-path", help="write a second copy of each checkpoint under this folder")
    group.add_argument("--no-local-save", action="store_true", help="write checkpoints to --cloud-save-path alone")
    group.add_argument("--log-every", type=int, default=100, help="steps between log lines")
    group.add_argument(
        "--ckpt-every", type=int, default=5000, help="steps between checkpoints; the last is always saved"
    )
    group.add_argument("--keep-last", type=int, default=0, help="keep this many newest checkpoints; 0 keeps all")
    group.add_argument(
        "--val-every", type=int, default=0, help="steps between validations; 0 validates at the end alone"
    )


def add_wandb_args(parser: argparse.ArgumentParser, project: str | None = None) -> None:
    """Weights & Biases beside TensorBoard; without the package a run goes on without it."""
    group = parser.add_argument_group("Weights & Biases")
    group.add_argument("--wandb-project", default=project, help="log the run to this project too")
    group.add_argument("--no-wandb", action="store_true", help="do not")


def wandb_project(args: argparse.Namespace) -> str | None:
    """The project to log to; None when none is wanted, or the command has no such flags."""
    return None if getattr(args, "no_wandb", False) else getattr(args, "wandb_project", None)


def add_optimizer_args(
    parser: argparse.ArgumentParser, epochs: int, global_batch_size: int, precisions: Sequence[str] = tuple(DTYPES)
) -> None:
    """Batch, length, optimizer, schedule and precision of a training run."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=epochs, help="passes over the data")
    group.add_argument("--max-steps", type=int, help="optimizer steps, in place of --epochs")
    group.add_argument("--global-batch-size", type=int, default=global_batch_size, help="samples per step, all ranks")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="micro-batches per step")
    group.add_argument(
        "--optimizer",
        choices=["adamw", "muon"],
        default="adamw",
        help="muon: Muon for the hidden weights, AdamW for the rest",
    )
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    group.add_argument("--lr-schedule", choices=SCHEDULES, default="constant", help="after the warm-up")
    group.add_argument("--lr-floor", type=float, default=0.0, help="where a schedule ends, as a share of --lr")
    group.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    group.add_argument("--weight-decay", type=float, default=0.05, help="decay of tensors of two or more dimensions")
    group.add_argument("--beta1", type=float, default=0.9, help="AdamW")
    group.add_argument("--beta2", type=float, default=0.95, help="AdamW")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="clip the global norm; 0 does not clip")
    group.add_argument("--mixed-precision", choices=precisions, default="bf16", help="autocast format")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the model; the default is yes on a GPU for the GPT, else no",
    )
    group.add_argument("--ema", action="store_true", help="keep an exponential moving average of the weights")


def num_workers(args: argparse.Namespace, local_size: int = 1) -> int:
    """Loader processes for one rank: what was asked for, but no more than its share of the CPU cores."""
    return min(args.num_workers, cpu_cores() // max(local_size, 1))


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 1)


def apply_threads(args: argparse.Namespace) -> None:
    """Set torch's CPU threads when the user asked for a number."""
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
