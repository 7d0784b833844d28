"""The training run: the loop around a recipe's step, with logs, validation, checkpoints, signals and exact resume.

A recipe gives a `step` function that consumes the micro-batches of one optimizer step and returns named losses, and
the objects whose state makes up a checkpoint. All randomness of step n is a function of (seed, n, rank), and the data
order is a function of (seed, n): a run that was stopped and continued is bit-equal to one that never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import checkpoint
from utils.args import wandb_project
from utils.distributed import any_rank, barrier, get_rank, get_world_size, is_main, mean_over_ranks
from utils.errors import Interrupted
from utils.logger import Metrics
from utils.progress import progress
from utils.run_folder import RunFolder, mark_finished
from utils.saving import Saver
from utils.seeding import seed_step
from utils.summary import draw_summary
from utils.throughput import StepCost, log_line, speed_of

Step = Callable[[Sequence[Any], int], Mapping[str, Tensor]]
REFUSED = "refused"  # what a step reports under this name is 1 if its other values do not count, else 0


@dataclass
class TrainSettings:
    """How long to train, and how often to speak, validate and save (all counts in optimizer steps)."""

    total_steps: int
    log_every: int = 100
    ckpt_every: int = 5000
    val_every: int = 0
    keep_last: int = 0
    seed: int = 0
    accumulation: int = 1
    wandb_project: str | None = None
    sharded: bool = False
    consolidated: str = "always"

    @classmethod
    def from_args(cls, args: argparse.Namespace, batches_per_epoch: int) -> TrainSettings:
        """From the flags of `utils.args.add_optimizer_args` and `add_run_args`."""
        return cls(
            total_steps=args.max_steps or args.epochs * batches_per_epoch,
            log_every=args.log_every,
            ckpt_every=args.ckpt_every,
            val_every=args.val_every,
            keep_last=args.keep_last,
            seed=args.global_seed,
            accumulation=args.gradient_accumulation_steps,
            wandb_project=wandb_project(args),
            sharded=getattr(args, "data_parallel", "ddp") != "ddp",
            consolidated=getattr(args, "consolidated", "always"),
        )


@dataclass
class Trainer:
    """Runs `step` until `settings.total_steps`.

    Args:
        step: (micro-batches, step number) -> named scalar tensors; the first one is the loss that is watched. A step
            that was refused returns none, or 1 under `REFUSED`.
        stateful: name -> object with state_dict and load_state_dict; together they are the checkpoint.
        extra: plain values that go into every checkpoint (the command's arguments).
        validate: returns named numbers; called every `val_every` steps and at the end, on every rank.
        pictures: returns named images (N, 3, H, W) in [-1, 1]; called with each validation, on every rank. Those of
            rank 0 are written to pictures/ in the run's folder, eight in a row.
        cost: what a step costs, for tokens per second and MFU.
        settle: waits for the verdict on the last step, if the step does not; called before each checkpoint.
    """

    run: RunFolder
    logger: logging.Logger
    device: torch.device
    loader: DataLoader
    step: Step
    stateful: Mapping[str, Any]
    settings: TrainSettings
    extra: Mapping[str, Any]
    validate: Callable[[], Mapping[str, float]] | None = None
    pictures: Callable[[], Mapping[str, Tensor]] | None = None
    cost: StepCost | None = None
    settle: Callable[[], None] = lambda: None
    steps_done: int = 0
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        chosen = self.settings
        self.saver = Saver(
            self.run, self.logger, self.stateful, self.extra, chosen.keep_last, chosen.sharded, chosen.consolidated
        )

    def fit(self) -> None:
        """Train to the end; the last state is always saved.

        Raises:
            Interrupted: after SIGINT, SIGTERM or SIGUSR1, once the state is saved.
            ValueError: when the loss is no longer a finite number; nothing is saved then.
        """
        window = _Window(self.device)
        metrics = Metrics(self.run.path, self.steps_done, self.settings.wandb_project)
        with _StopRequest() as stop, self._bar() as bar:
            for number, batches in self._numbered_batches():
                seed_step(self.settings.seed, number, get_rank())
                window.add(self.step(batches, number))
                self.steps_done = number
                bar.update()
                if self._due(self.settings.log_every):
                    self._log(window, metrics, bar)
                if self._due(self.settings.val_every, at_end=True):
                    with window.paused():
                        self._validate(metrics)
                        self._show(metrics)
                stopping = self._should_stop(stop)
                if stopping or self._due(self.settings.ckpt_every, at_end=True):
                    self.settle()
                    self._finite_means(window)  # never replace a good checkpoint by a broken one
                    with window.paused():
                        self.save()
                if stopping:
                    self.saver.wait()
                    self.logger.info(f"Stopped at step {number}; the same command continues from here.")
                    raise Interrupted(stop.signum or signal.SIGTERM)
        self.saver.wait()
        metrics.close()
        if is_main():
            draw_summary(self.run.path)
            mark_finished(self.run)
        barrier()

    def _numbered_batches(self) -> Iterator[tuple[int, list[Any]]]:
        micro_batches = iter(self.loader) if self.steps_done < self.settings.total_steps else iter(())
        for number in range(self.steps_done + 1, self.settings.total_steps + 1):
            yield number, [next(micro_batches) for _ in range(self.settings.accumulation)]

    def _due(self, every: int, at_end: bool = False) -> bool:
        last = at_end and self.steps_done == self.settings.total_steps
        return last or (every > 0 and self.steps_done % every == 0)

    def _bar(self) -> tqdm:
        return progress(self.settings.total_steps, "step", done=self.steps_done, what=self.run.path.name)

    def _should_stop(self, stop: _StopRequest) -> bool:
        # Asking the other GPUs makes the CPU wait for the step, so it is not done on each.
        if dist.is_initialized() and self.device.type == "cuda" and self.steps_done % 10:
            return False
        return any_rank(stop.signum is not None, self.device)

    def _log(self, window: _Window, metrics: Metrics, bar: tqdm) -> None:
        means, steps_per_second = self._finite_means(window), window.steps_per_second()
        window.reset()
        if not means:  # every step since the last line was refused, as the log says
            return
        speed = speed_of(self.cost, steps_per_second, self.device, get_world_size())
        remaining = (self.settings.total_steps - self.steps_done) / steps_per_second
        self.logger.info(log_line(self.steps_done, means, speed, remaining))
        metrics.write(self.steps_done, {**means, **speed})
        bar.set_postfix(loss=f"{next(iter(means.values())):.4f}", refresh=False)

    def _finite_means(self, window: _Window) -> dict[str, float]:
        means = window.means()
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"{bad[0]} is not a finite number at step {self.steps_done}; the last good checkpoint is "
                f"{self.run.latest_checkpoint() or 'none'}. Try a lower --lr, --max-grad-norm 1.0 or "
                f"--mixed-precision none"
            )
        return means

    def _validate(self, metrics: Metrics) -> None:
        if self.validate is None:
            return
        values = self.validate()
        metrics.write(self.steps_done, {f"val/{name}": value for name, value in values.items()})
        shown = ", ".join(f"{name}: {value:.4f}" for name, value in values.items())
        self.logger.info(f"(step={self.steps_done:07d}) Validation {shown}")

    def _show(self, metrics: Metrics) -> None:
        if self.pictures is not None:
            metrics.write_pictures(self.steps_done, self.pictures())

    def save(self) -> None:
        """Write a checkpoint of the present step; all processes call this."""
        self.saver.save(self.steps_done, last=self.steps_done == self.settings.total_steps)

    def resume(self, given: str | None = None, suggest: checkpoint.Suggest | None = None, restart: bool = False) -> int:
        """Continue from the run's own newest checkpoint, else from the one `given`, else from scratch.

        See `Saver.restore`. With `restart` (fine-tuning) the steps of a `given` checkpoint do not count. Returns the
        number of steps done.
        """
        own = self.run.latest_checkpoint()
        source = own or (Path(given) if given else None)
        if source is None:
            return 0
        steps = self.saver.restore(source, suggest)
        if own or not restart:
            self.steps_done = steps or 0
        self.logger.info(f"Resume training from checkpoint: {source}, steps={self.steps_done}")
        return self.steps_done


class _Window:
    """Keeps named losses where they are, mostly on `device`, between two log lines, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.values: dict[str, list[Tensor]] = {}
        self.refused: dict[str, list[Tensor]] = {}  # for each value whether it counts, if the step says so
        self.count, self.started = 0, time.perf_counter()

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the losses of one step."""
        for name, value in values.items():
            if name == REFUSED:
                continue
            self.values.setdefault(name, []).append(torch.as_tensor(value).detach().float())
            if REFUSED in values:
                self.refused.setdefault(name, []).append(values[REFUSED])
        self.count += 1

    def means(self) -> dict[str, float]:
        """Means over the window and all ranks, of the steps that were not refused; waits for the device."""
        counted = {name: self._counted(name) for name in self.values}
        means = {name: values.mean() for name, values in counted.items() if len(values)}
        if not means:
            return {}
        return dict(zip(means, mean_over_ranks(torch.stack(list(means.values()))).tolist()))

    def _counted(self, name: str) -> Tensor:
        values = torch.stack([value.to(self.device) for value in self.values[name]])
        return values[torch.stack(self.refused[name]) == 0] if name in self.refused else values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training: its time does not count."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def steps_per_second(self) -> float:
        """Speed of training since the window was opened."""
        return self.count / max(time.perf_counter() - self.started, 1e-9)


class _StopRequest:
    """Notes SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) inside the block instead of dying; a second SIGINT does."""

    signum: int | None = None

    def __enter__(self) -> _StopRequest:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum

    def __exit__(self, *exc: Any) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
