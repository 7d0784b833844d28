"""FSDP2 in one process, over NCCL on a GPU: it trains as DDP does, and checkpoints move between the two.

Whole trainings of GPT-XS by the recipe of the commands, six steps on random codes in a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from autoregressive.train import train_c2i, train_c2i_fsdp
from autoregressive.train.recipe import train
from benchmarks.gpu.context import Context
from benchmarks.gpu.goldens import exact_float32
from dataset.codes import CodeFolder, write_codes
from utils import checkpoint
from utils.distributed import group_device, process_group
from utils.logger import read_metrics

STEPS = 6
SIZE = ["--gpt-model", "GPT-XS", "--num-classes", "3", "--image-size", "16", "--downsample-size", "4"]
SIZE += ["--vocab-size", "64", "--global-batch-size", "4", "--num-workers", "0", "--log-every", "1", "--ema"]
SIZE += ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]
SCHEDULE = ["--lr", "1e-3", "--lr-schedule", "constant", "--ckpt-every", "3"]
EXACT, EAGER = ["--mixed-precision", "fp32"], ["--no-compile"]
COMPILING_S, TRAINING_S = 15.0, 5.0  # what a training may take, with and without compiling; else it is left out


@dataclass(frozen=True)
class Runs:
    """Trainings in `folder`, each in a folder of its own name, on the same codes."""

    context: Context
    folder: Path

    def write_codes(self) -> None:
        """Two views of 4 x 4 codes of each of twelve images."""
        generator = np.random.default_rng(0)
        codes = CodeFolder.named(self.folder / "codes", "imagenet", 16)
        for i in range(12):
            write_codes(codes, i, generator.integers(0, 64, (2, 16)), i % 3)

    def train(self, name: str, command: ModuleType, *flags: str) -> list[float]:
        """Train by `command` as `flags` say; returns `losses`."""
        place = ["--code-path", str(self.folder / "codes"), "--run-dir", str(self.folder / name)]
        place += ["--device", self.context.device.type, "--max-steps", str(STEPS)]
        train(command.parser().parse_args([*SIZE, *SCHEDULE, *place, *flags]))
        return self.losses(name)

    def losses(self, name: str) -> list[float]:
        """The losses in the log of a training, one a step."""
        return [entry["loss"] for entry in read_metrics(self.folder / name / "metrics.jsonl")]

    def trained(self, *names: str) -> bool:
        """Whether all these trainings came to their end."""
        return all(self.checkpoint(name).exists() for name in names)

    def checkpoint(self, name: str, step: int = STEPS) -> Path:
        """The file or folder of a training's checkpoint after `step`."""
        folder = self.folder / name / "checkpoints" / f"{step:07d}"
        return folder if folder.is_dir() else folder.with_suffix(".pt")


def run(context: Context) -> None:
    """FSDP against DDP in float32, their checkpoints, then half precision and compiled blocks.

    No training draws its curves: that would take longer than its steps.
    """
    no_curves = mock.patch("utils.trainer.draw_summary")
    with tempfile.TemporaryDirectory() as name, exact_float32(), no_curves:
        runs = Runs(context, Path(name))
        runs.write_codes()
        with context.attempt("process group"):
            check_group(context)
        with context.attempt("fsdp"):
            check_losses(context, runs)
        with context.attempt("checkpoints"):
            check_checkpoints(context, runs)
        with context.attempt("fp16"):
            check_fp16(context, runs)
        with context.attempt("bf16"):
            check_bf16(context, runs)


def check_group(context: Context) -> None:
    """A group of one process exchanges tensors where they are: on the GPU by NCCL, on the CPU by gloo."""
    with process_group(context.device.type, even_alone=True) as device:
        backend, exchanged = dist.get_backend(), group_device()
        total = torch.ones(3, device=device)
        dist.all_reduce(total)
        context.check("tensors are exchanged on the device", exchanged.type == device.type, backend=backend)
        context.check("all_reduce", total.tolist() == [1.0] * 3)


def largest_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest absolute difference of two state dicts with the same keys (KeyError); infinite for other shapes."""
    if one.keys() != other.keys():
        raise KeyError(f"other keys: {sorted(one.keys() ^ other.keys())[:5]}")
    return _largest([_difference(value, other[key]) for key, value in one.items()])


def _largest(values: list[float]) -> float:
    """The maximum; NaN where one is, which `max` would lose, and infinite for none."""
    return float(torch.tensor(values, dtype=torch.float64).max()) if values else float("inf")


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).abs().max()) if a.shape == b.shape else float("inf")


def compare_losses(context: Context, name: str, losses: list[float], expected: list[float], limit: float) -> None:
    """Check that there are as many losses as expected, within `limit` of them."""
    found = _largest([abs(a - b) for a, b in zip(losses, expected)])
    same = len(losses) == len(expected) and found <= limit
    context.check(name, same, largest_difference=found, limit=limit, losses=[round(loss, 5) for loss in losses])


def check_losses(context: Context, runs: Runs) -> None:
    """Each sharded strategy has the losses, the weights and the EMA weights of DDP."""
    if not context.has_time("losses of ddp", TRAINING_S):
        return
    expected = runs.train("ddp", train_c2i, *EXACT, *EAGER)
    whole = checkpoint.read(runs.checkpoint("ddp"))
    for strategy in ("fsdp", "sdp", "hsdp"):
        if not context.has_time(f"{strategy}: losses of ddp", TRAINING_S):
            break
        losses = runs.train(strategy, train_c2i_fsdp, *EXACT, *EAGER, "--data-parallel", strategy)
        compare_losses(context, f"{strategy}: losses of ddp", losses, expected, 2e-5)
        sharded = checkpoint.read(runs.checkpoint(strategy))
        for part in ("model", "ema"):
            found = largest_difference(sharded[part], whole[part])
            context.check(f"{strategy}: {part} of ddp", found <= 3e-5, largest_difference=found)
        if context.tiny:
            break


def check_checkpoints(context: Context, runs: Runs) -> None:
    """A sharded checkpoint is whole; each kind of training continues from the other's after three steps."""
    if not runs.trained("ddp", "fsdp"):
        context.record("asynchronous checkpoints are whole", skipped="there are none")
        return
    folder = runs.checkpoint("fsdp")
    left = [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]
    context.check("asynchronous checkpoints are whole", not left, unfinished=left, files=len(list(folder.iterdir())))
    weights = torch.load(folder / "consolidated.pth", weights_only=True, map_location="cpu")
    found = largest_difference(weights, checkpoint.read(folder)["model"])
    context.check("consolidated.pth", found == 0, largest_difference=found)
    expected = runs.losses("ddp")[3:]
    for name, command, source in (("ddp", train_c2i, "fsdp"), ("fsdp", train_c2i_fsdp, "ddp")):
        if not context.has_time(f"{name} continues {source}", TRAINING_S):
            break
        given = ["--gpt-ckpt", str(runs.checkpoint(source, 3))]
        losses = runs.train(f"{name} from {source}", command, *EXACT, *EAGER, *given)
        compare_losses(context, f"{name} continues {source}", losses, expected, 2e-5)


def check_fp16(context: Context, runs: Runs) -> None:
    """With fp16 the loss scaler works, with and without sharding, and is part of the checkpoint."""
    if context.device.type != "cuda":
        context.record("fp16", skipped="needs a GPU")
        return
    for name, command in (("ddp", train_c2i), ("fsdp", train_c2i_fsdp)):
        if not context.has_time(f"{name}: fp16", TRAINING_S):
            break
        losses = runs.train(f"{name} fp16", command, "--mixed-precision", "fp16", *EAGER)
        scaler = checkpoint.read(runs.checkpoint(f"{name} fp16")).get("scaler", {})
        finite = len(losses) == STEPS and bool(np.isfinite(losses).all())
        values = {"losses": losses, "loss_scale": scaler.get("scale")}
        context.check(f"{name}: fp16", finite and scaler.get("scale", 0) > 0, **values)


def check_bf16(context: Context, runs: Runs) -> None:
    """The losses of FSDP and DDP in bf16, eager and, on a GPU, compiled with selective checkpointing."""
    if not context.has_time("fsdp: bf16 losses of ddp", 2 * TRAINING_S):
        return
    expected = runs.train("ddp bf16", train_c2i, "--mixed-precision", "bf16", *EAGER)
    losses = runs.train("fsdp bf16", train_c2i_fsdp, "--mixed-precision", "bf16", *EAGER)
    compare_losses(context, "fsdp: bf16 losses of ddp", losses, expected, 2e-2)
    if context.device.type != "cuda":
        context.record("fsdp compiled", skipped="needs a GPU")
        return
    if not context.has_time("fsdp compiled", COMPILING_S):
        return
    flags = ["--mixed-precision", "bf16", "--compile", "--activation-checkpointing", "selective"]
    losses = runs.train("fsdp compiled", train_c2i_fsdp, *flags)
    compare_losses(context, "fsdp: bf16 losses of ddp, compiled, selective checkpointing", losses, expected, 2e-2)
