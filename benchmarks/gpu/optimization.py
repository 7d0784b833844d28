"""Training on this device: the losses of the CPU in float32, and what compiling, recomputing and resuming change.

GPT-XS on fixed random codes, without dropout where losses are compared. Differences of losses are relative to the loss.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.train import train_c2i, train_t2i
from autoregressive.train.step import TrainStep
from benchmarks.gpu.context import Context
from benchmarks.gpu.goldens import exact_float32
from utils.guard import LossGuard
from utils.run_folder import RunFolder
from utils.saving import Saver
from utils.seeding import seed_step

Batch = tuple[Tensor, ...]

IMAGES = 8
NO_DROPOUT = ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]
CAPTION_POSITIONS, CAPTION_WIDTH = 12, 32
COMPILING_S, PART_S = 15.0, 6.0  # what a part may take, with and without compiling; without it a part is left out
CPU_STEPS = 6  # of a training whose losses are compared with the CPU's, which takes a second for each
CPU = torch.device("cpu")


class Trainings:
    """Trainings of one size: 64 codes an image and 24 steps, or in the tiny program 16 codes and 6 steps."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.grid, self.codebook, self.steps = (4, 64, 6) if context.tiny else (8, 512, 24)

    def step(self, device: torch.device, *flags: str, texts: bool = False, guard: LossGuard | None = None) -> TrainStep:
        """A new training; `flags` come after those of the size."""
        size = ["--gpt-model", "GPT-XS", "--image-size", str(8 * self.grid), "--downsample-size", "8"]
        size += ["--vocab-size", str(self.codebook), "--num-classes", "10", "--code-path", "none", "--lr", "1e-3"]
        if texts:
            size += ["--t5-feat-path", "none", "--dataset", "t2i_code", "--cls-token-num", str(CAPTION_POSITIONS)]
            size += ["--caption-dim", str(CAPTION_WIDTH)]
        parser = (train_t2i if texts else train_c2i).parser()
        return TrainStep(parser.parse_args([*size, *flags]), device, self.steps, guard=guard)

    def batches(self, number: int, texts: bool = False, parts: int = 1) -> list[Batch]:
        """The micro-batches of step `number`, on the CPU; three steps take turns, so that there is much to learn."""
        generator = torch.Generator().manual_seed(number % 3)
        codes = torch.randint(self.codebook, (IMAGES, 1, self.grid**2), generator=generator)
        batch: Batch = (codes, torch.randint(10, (IMAGES, 1), generator=generator))
        if texts:
            features = torch.randn(IMAGES, 1, CAPTION_POSITIONS, CAPTION_WIDTH, generator=generator)
            mask = torch.arange(CAPTION_POSITIONS) >= CAPTION_POSITIONS - 1 - torch.arange(IMAGES)[:, None]
            batch = (codes, features * mask[:, None, :, None], mask, torch.ones(IMAGES))
        return list(zip(*(part.chunk(parts) for part in batch)))

    def losses(self, step: TrainStep, numbers: Sequence[int], **options: int) -> list[float]:
        """Take the steps `numbers` as the trainer does, and return their losses."""
        found = []
        for number in numbers:
            seed_step(0, number, 0)
            found.append(step(self.batches(number, **options), number)["loss"])
        return torch.stack(found).tolist()

    def all_losses(self, device: torch.device, *flags: str) -> list[float]:
        """The losses of a whole training."""
        return self.losses(self.step(device, *flags), range(1, self.steps + 1))

    def first_losses(self, device: torch.device, *flags: str, texts: bool = False, parts: int = 1) -> list[float]:
        """The losses of the first `CPU_STEPS` steps of a training."""
        return self.losses(self.step(device, *flags, texts=texts), range(1, CPU_STEPS + 1), texts=texts, parts=parts)


def run(context: Context) -> None:
    """Losses against the CPU, the guard, resuming, what needs compiling; at last the other optimizer."""
    if context.tiny:
        torch._dynamo.config.disable = True  # the flags are the same, without the minutes of compiling
    trainings = Trainings(context)
    with exact_float32():
        with context.attempt("float32"):
            check_float32(context, trainings)
        with context.attempt("guard"):
            if context.has_time("guard", PART_S):
                check_guard(context, trainings)
        for precision in ("fp32", "bf16"):
            with context.attempt(f"resume {precision}"):
                if context.has_time(f"resume {precision}", PART_S):
                    check_resume(context, trainings, precision)
        with context.attempt("compiled"):
            check_compiled(context, trainings)
        with context.attempt("muon"):
            if context.has_time("muon learns", PART_S):
                check_muon(context, trainings)


def difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference of two sequences of losses; NaN if one of them is."""
    a, b = torch.tensor(losses, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return float(((a - b) / b).abs().max())


def compare(context: Context, name: str, losses: list[float], expected: list[float], limit: float) -> None:
    """Check that losses are within `limit`, relatively, of the expected ones."""
    found = difference(losses, expected)
    ends = {"first_loss": losses[0], "last_loss": losses[-1], "steps": len(losses)}
    context.check(name, found <= limit, largest_relative_difference=found, limit=limit, **ends)


def check_float32(context: Context, trainings: Trainings) -> None:
    """Classes and captions on both devices, and two micro-batches in place of one batch."""
    flags = ["--mixed-precision", "fp32", "--no-compile", "--ema", *NO_DROPOUT]
    if not context.has_time("losses of the CPU", PART_S):
        return
    on_device, on_cpu = (trainings.first_losses(place, *flags) for place in (context.device, CPU))
    compare(context, "losses of the CPU", on_device, on_cpu, 1e-4)
    if context.has_time("losses of the CPU, captions", PART_S):
        texts = [trainings.first_losses(place, *flags, texts=True) for place in (context.device, CPU)]
        compare(context, "losses of the CPU, captions", *texts, 1e-4)
    if context.has_time("two micro-batches", PART_S):
        compare(context, "two micro-batches", trainings.first_losses(context.device, *flags, parts=2), on_cpu, 1e-4)


def check_muon(context: Context, trainings: Trainings) -> None:
    """The loss falls with the optimizer of matrices."""
    flags = ["--mixed-precision", "fp32", "--no-compile", "--ema", *NO_DROPOUT, "--optimizer", "muon"]
    losses = trainings.all_losses(context.device, *flags)
    context.check("muon learns", losses[-1] < losses[0], first_loss=losses[0], last_loss=losses[-1])


def check_guard(context: Context, trainings: Trainings) -> None:
    """A weight that is no number stops the training, at the latest with the next step, and changes no other weight."""
    with tempfile.TemporaryDirectory() as folder:
        guard = LossGuard("stop", 0.0, Path(folder), logging.getLogger("llamagen"))
        step = trainings.step(context.device, "--mixed-precision", "bf16", "--no-compile", guard=guard)
        trainings.losses(step, [1, 2])
        with torch.no_grad():
            step.model.norm.weight[0] = float("nan")
        before, message = weights(step).nan_to_num(), ""
        try:
            trainings.losses(step, [3, 4])
        except ValueError as error:
            message = str(error)
        changed = int((weights(step).nan_to_num() != before).sum())
        kept = [path.name for path in Path(folder).iterdir()]
    context.check("guard stops", "not a finite number" in message and "step 3" in message, message=message)
    context.check("guard keeps the weights", changed == 0, weights_changed=changed)
    context.check("guard keeps the batch", kept == ["0000003-rank0.pt"], files=kept)


def check_resume(context: Context, trainings: Trainings, precision: str) -> None:
    """A training with dropout that is stopped half-way and continued, against one that is not, and against a repeat.

    On a GPU attention's backward pass may add in any order, so the repeat shows how equal a continuation can be.
    """
    flags = ["--mixed-precision", precision, "--no-compile", "--ema"]
    half = trainings.steps // 3
    first, last = range(1, half + 1), range(half + 1, 2 * half + 1)
    whole, repeat, stopped, resumed = (trainings.step(context.device, *flags) for _ in range(4))
    expected = trainings.losses(whole, [*first, *last])
    repeated = trainings.losses(repeat, [*first, *last])
    trainings.losses(stopped, first)
    with tempfile.TemporaryDirectory() as name:
        run, logger = RunFolder(Path(name), [Path(name)]), logging.getLogger("llamagen")
        Saver(run, logger, stopped.stateful(), {}).save(half)
        steps = Saver(run, logger, resumed.stateful(), {}).restore(run.latest_checkpoint())
    continued = trainings.losses(resumed, last)
    found = difference(continued, expected[half:])
    context.check(
        f"resume {precision}",
        steps == half and found <= 1e-3,
        resumed_after_steps=steps,
        largest_relative_loss_difference=found,
        largest_weight_difference=float((weights(resumed) - weights(whole)).abs().max()),
        of_a_repeat=difference(repeated, expected),
        largest_weight_difference_of_a_repeat=float((weights(repeat) - weights(whole)).abs().max()),
    )


def weights(step: TrainStep) -> Tensor:
    """All weights, float32 (parameters,), on the CPU."""
    return torch.nn.utils.parameters_to_vector(step.model.parameters()).detach().cpu()


def check_compiled(context: Context, trainings: Trainings) -> None:
    """Compiled blocks, alone and with activations computed again, against eager ones."""
    if not context.has_time("bf16 against fp32", PART_S):
        return
    eager = {
        precision: trainings.all_losses(context.device, "--mixed-precision", precision, "--no-compile", *NO_DROPOUT)
        for precision in ("bf16", "fp32")
    }
    compare(context, "bf16 against fp32", eager["bf16"], eager["fp32"], 1e-2)
    for precision, mode in (("bf16", "none"), ("fp32", "selective"), ("fp32", "full"), ("bf16", "selective")):
        name = f"compiled {precision}, activation checkpointing {mode}"
        if not context.has_time(name, COMPILING_S):
            continue
        flags = ["--mixed-precision", precision, "--compile", "--activation-checkpointing", mode, *NO_DROPOUT]
        losses = trainings.all_losses(context.device, *flags)
        compare(context, name, losses, eager[precision], 1e-2 if precision == "bf16" else 1e-4)
