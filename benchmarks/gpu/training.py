"""Training steps as the command takes them: its loader, its step with the guard, its loop; speed, MFU, memory, gaps."""

from __future__ import annotations

import argparse
import gc
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoregressive.train import train_c2i
from autoregressive.train.inputs import make_inputs
from autoregressive.train.step import TrainStep
from benchmarks.gpu.context import Context
from benchmarks.gpu.probe import ceilings
from benchmarks.gpu.profiling import profile
from dataset.packing import PackedWriter
from dataset.sampler import training_loader
from utils.batches import in_batches
from utils.flops import hardware_of, training_flops_per_image
from utils.guard import LossGuard
from utils.precision import allow_tf32
from utils.run_folder import open_run
from utils.trainer import Trainer, TrainSettings

_WARM_UP, _TIMED = 3, 6  # steps
_IMAGES = 512  # in the folder of codes


class Case(NamedTuple):
    """One way to train; `images` is a micro-batch."""

    model: str
    images: int
    accumulation: int = 1
    checkpointing: str = "none"
    compiled: bool = True
    seconds: float = 30.0  # that are needed to begin it
    flags: tuple[str, ...] = ()  # further ones of the command

    @property
    def name(self) -> str:
        """For people, and the name of its records."""
        return ", ".join([self.model, "compiled" if self.compiled else "eager", *filter(None, [" ".join(self.flags)])])


_SHORT_RESIDUALS = ("--residual-dtype", "compute")
CASES = (
    Case("GPT-L", 32),
    Case("GPT-3B", 8, accumulation=4, checkpointing="selective"),
    Case("GPT-XL", 24),
    Case("GPT-XXL", 16, accumulation=4, checkpointing="selective"),
    Case("GPT-L", 32, seconds=20, flags=_SHORT_RESIDUALS),
    Case("GPT-XL", 24, seconds=20, flags=_SHORT_RESIDUALS),
    # larger micro-batches: fewer casts of the weights and sums of their gradients in a step; less computed twice
    Case("GPT-3B", 16, accumulation=2, checkpointing="selective", flags=_SHORT_RESIDUALS),
    Case("GPT-XXL", 32, accumulation=2, flags=_SHORT_RESIDUALS),
    Case("GPT-L", 32, compiled=False, seconds=12),
    Case("GPT-XL", 24, compiled=False, seconds=12),
)
TINY = (
    Case("GPT-XS", 2, flags=_SHORT_RESIDUALS),
    Case("GPT-XS", 4, accumulation=2, checkpointing="selective", compiled=False),
)


def run(context: Context) -> None:
    """All cases, for as long as there is time."""
    allow_tf32()
    # a compiled block takes a CPU a minute, and the compiler is the same for all sizes: the tiny run goes without
    torch.compiler.set_stance("force_eager" if context.tiny else "default")
    (context.out / "training_profile.txt").write_text("")
    with tempfile.TemporaryDirectory() as folder:
        size = 384 if not context.tiny else 64
        write_codes(Path(folder), size, 16384 if not context.tiny else 64)
        for case in CASES if not context.tiny else TINY:
            with context.attempt(case.name):
                if context.seconds_left < case.seconds:
                    context.record(case.name, skipped=f"{context.seconds_left:.0f} s left")
                    continue
                # the batch is halved until it fits
                work = in_batches(lambda items, case=case: _measure(context, case, len(items), folder, size),
                                  [range(case.images)])  # fmt: skip
                next(work)


def write_codes(folder: Path, image_size: int, vocab_size: int) -> None:
    """A packed store of random codes, as the extraction of images of `image_size` pixels writes it."""
    tokens = (image_size // 16) ** 2
    store = PackedWriter(
        folder / f"imagenet{image_size}_packed", "class", images=_IMAGES, views=1, tokens=tokens,
        codebook_size=vocab_size, settings={"image_size": image_size},
    )  # fmt: skip
    random = np.random.default_rng(0)
    store.claim()
    for shard, rows in enumerate(store.shards):
        codes = random.integers(vocab_size, size=(len(rows), 1, tokens))
        store.write(shard, codes, random.integers(1000, size=len(rows)))
    store.finish()


def training_args(case: Case, images: int, folder: str, run_dir: str, image_size: int) -> argparse.Namespace:
    """The flags of the command for a case."""
    flags = ["--gpt-model", case.model, "--image-size", str(image_size), "--code-path", folder, "--run-dir", run_dir]
    flags += ["--global-batch-size", str(images * case.accumulation), "--max-steps", str(_WARM_UP + _TIMED)]
    flags += ["--gradient-accumulation-steps", str(case.accumulation), "--num-workers", "8" if image_size > 64 else "0"]
    flags += ["--activation-checkpointing", case.checkpointing, "--compile" if case.compiled else "--no-compile"]
    flags += case.flags
    return train_c2i.parser().parse_args([*flags, "--log-every", "0", "--vocab-size", "16384"])


class Unsaved(Trainer):
    """The command's loop without its checkpoints, which have nothing to do with the speed."""

    ended = 0.0

    def save(self) -> None:
        """Called when the last step is done and the device has given its losses."""
        self.ended = time.perf_counter()


@dataclass
class Watched:
    """A step function that notes when the warm-up is over, and keeps the last batches and losses."""

    step: TrainStep
    context: Context
    started: float = 0.0
    batches: Sequence[Any] = ()
    first: Mapping[str, Tensor] | None = None
    last: Mapping[str, Tensor] | None = None

    def __call__(self, batches: Sequence[Any], number: int) -> Mapping[str, Tensor]:
        self.batches, self.last = batches, self.step(batches, number)
        self.first = self.first or self.last
        if number == _WARM_UP:
            self.started = self.context.synchronize()
        return self.last


def _measure(context: Context, case: Case, images: int, folder: str, image_size: int) -> int:
    """Train for a few steps and record what they took; returns the images of a micro-batch."""
    gc.collect()  # compiled blocks refer to themselves: the weights of the case before may still be there
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    context.reset_peak()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as run_dir:
        args = training_args(case, images, folder, run_dir, image_size)
        step, trainer, watched = _prepare(context, args)
        trainer.fit()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = (trainer.ended - watched.started) / _TIMED
    config, batch = step.model.config, args.global_batch_size
    flops = batch * training_flops_per_image(config) / seconds
    context.record(
        "training", gpt_model=case.model, images=images, accumulation=case.accumulation,
        checkpointing=case.checkpointing, compiled=case.compiled, flags=" ".join(case.flags), ms_per_step=1e3 * seconds,
        images_per_s=batch / seconds, **_shares(context, flops), peak_gb=context.peak_memory_gb(),
        prepare_seconds=watched.started - began, graphs=graphs,
    )  # fmt: skip
    if case.compiled:
        context.check(f"{case.name}: one graph for all blocks", graphs < config.n_layer, graphs=graphs)
    # nothing can be learned of random codes: the loss stays about ln V, where a model begins that knows nothing
    losses, expected = [float(found["loss"]) for found in (watched.first, watched.last) if found], math.log(16384)
    near = [abs(loss - expected) < 0.3 for loss in losses]
    context.check(f"{case.name}: losses", len(near) == 2 and all(near), losses=losses, expected=expected)
    _profile(context, case, watched)
    return images


def _prepare(context: Context, args: argparse.Namespace) -> tuple[TrainStep, Unsaved, Watched]:
    """The parts of `autoregressive.train.recipe.make_trainer` that a step needs."""
    inputs = make_inputs(args, context.device)
    sampler, loader = training_loader(inputs.training_set(), args, context.device)
    settings, run_folder = TrainSettings.from_args(args, sampler.batches_per_epoch), open_run(args, args.gpt_model)
    logger = logging.getLogger("llamagen.benchmark")
    guard = LossGuard(args.on_bad_loss, args.spike_threshold, run_folder.path / "bad-batches", logger)
    with context.device:  # weights are made where they are used: three billion take a minute on a CPU
        step = TrainStep(args, context.device, settings.total_steps, inputs, guard)
    watched = Watched(step, context)
    trainer = Unsaved(
        run_folder, logger, context.device, loader, watched, step.stateful(), settings, extra={}, settle=step.settle
    )
    return step, trainer, watched


def _shares(context: Context, flops_per_second: float) -> dict[str, float]:
    """MFU by the data sheet, where the GPU is known, and by the rate of a product that was measured here."""
    found = {}
    if context.device.type == "cuda":
        hardware = hardware_of(torch.cuda.get_device_name(context.device))
        if hardware is not None:
            found["mfu"] = flops_per_second / hardware.flops_per_second
    return found | {"share_of_measured_product": flops_per_second / 1e12 / ceilings(context)[1]}


def _profile(context: Context, case: Case, watched: Watched) -> None:
    """Two more steps under the profiler: idle share and the kernels that take longest."""
    first = _WARM_UP + _TIMED + 1
    found = profile(context, lambda: [watched.step(watched.batches, first + i) for i in range(2)])
    with (context.out / "training_profile.txt").open("a") as file:
        file.write(f"{case.name}: two steps\n{found.table()}\n")
    context.record("profile", case=case.name, idle_share=found.idle_share, kernels=found.top())
