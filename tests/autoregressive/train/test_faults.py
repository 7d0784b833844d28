"""Trainings that are preempted, lose a process, meet a broken batch or run out of disk."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from autoregressive.train import recipe, step, train_c2i, train_c2i_fsdp
from autoregressive.train.recipe import train
from autoregressive.train.step import TrainStep
from tests.commands.shell import GPT_FLAGS, ROOT, command_line, environment
from tests.commands.test_faults import random_codes
from tests.processes import in_processes
from utils import checkpoint, errors
from utils.errors import REQUEUE
from utils.errors import run as as_command
from utils.logger import read_metrics

FSDP = "autoregressive/train/train_c2i_fsdp.py"
NO_CHANCE = ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    return random_codes(tmp_path_factory.mktemp("codes"))


def arguments(command, *flags):
    return command.parser().parse_args([*map(str, [*GPT_FLAGS, "--lr", "1e-3", *flags])])


def steps_of(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(folder / "metrics.jsonl")]


def exit_code_of_a_signal(command, signum, rank, run_dir, *flags):
    """The exit code of a training that gets `signum` in process `rank` alone, once three steps are logged."""

    def send():
        while len(steps_of(run_dir)) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    if int(os.environ.get("RANK", 0)) == rank:
        threading.Thread(target=send, daemon=True).start()
    errors._exit = sys.exit  # one of several processes would end before it can say its code
    try:
        as_command(lambda: train(arguments(command, "--run-dir", run_dir, "--max-steps", 100_000, *flags)))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("command", "signum"),
    [(train_c2i, signal.SIGTERM), (train_c2i, signal.SIGUSR1), (train_c2i_fsdp, signal.SIGUSR1)],
    ids=["ddp-term", "ddp-usr1", "fsdp-usr1"],
)
def test_a_warning_to_one_process_saves_and_asks_for_another_start(command, signum, codes, tmp_path):
    flags = [command, signum, 1, tmp_path, "--code-path", codes, "--ckpt-every", 100_000]
    assert in_processes(2, exit_code_of_a_signal, *flags) == [REQUEUE, REQUEUE] == [75, 75]
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert checkpoint.read(newest)["steps"] == checkpoint.step_of(newest) >= 3
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_torchrun_restarts_after_a_process_is_killed_and_nothing_changes(codes, tmp_path):
    """SIGKILL to one of two processes: the launcher starts both again, they go on from the last whole checkpoint."""
    flags = [*GPT_FLAGS, "--code-path", codes, "--max-steps", 60, "--ckpt-every", 5, "--lr", "1e-3", *NO_CHANCE]
    in_processes(2, whole_training, train_c2i_fsdp, *flags, "--run-dir", tmp_path / "whole")
    # On a busy machine gloo does not always find its peers again after a restart (torch 2.14.1): three tries.
    tries = (killed_and_restarted(tmp_path / f"killed-{number}", flags) for number in range(3))
    folder, printed = next(((folder, text) for folder, text in tries if text is not None), (None, ""))
    assert folder is not None
    assert "Resume training from checkpoint" in printed
    whole, killed = (checkpoint.read(run / "checkpoints/0000060") for run in (tmp_path / "whole", folder))
    torch.testing.assert_close(whole["model"], killed["model"], atol=0, rtol=0)
    assert steps_of(folder) == list(range(1, 61))


def killed_and_restarted(folder: Path, flags: list) -> tuple[Path, str | None]:
    """`folder` and what torchrun printed while it trained there and one process was killed; None if it failed."""
    line = command_line(FSDP, *flags, "--run-dir", folder, processes=2)
    line[line.index(FSDP) : line.index(FSDP)] = ["--max-restarts=3", "--monitor-interval=1"]
    launcher = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while checkpoint.latest(folder / "checkpoints") is None:
            assert launcher.poll() is None, launcher.communicate()[0].decode()
            time.sleep(0.02)
        os.kill(worker_of(launcher.pid), signal.SIGKILL)
        printed = launcher.communicate(timeout=150)[0].decode()
        return folder, printed if launcher.returncode == 0 else None
    except subprocess.TimeoutExpired:
        return folder, None
    finally:
        launcher.terminate()  # it ends its processes too


def whole_training(command, *flags):
    train(command.parser().parse_args([*map(str, flags)]))


def worker_of(launcher: int) -> int:
    """The last process that torchrun has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(children[-1])


class BrokenStep(TrainStep):
    """A training whose forward gives nonsense at some steps."""

    broken: dict[int, float] = {}

    def __call__(self, batches, number):
        self.factor = self.broken.get(number, 1.0)
        return super().__call__(batches, number)

    def _backward(self, batch, share, last):
        return super()._backward(batch, share * self.factor, last)


def broken_training(command, broken, *flags):
    BrokenStep.broken = broken
    recipe.TrainStep = BrokenStep
    train(arguments(command, *flags))


@pytest.mark.parametrize(("command", "world"), [(train_c2i, 1), (train_c2i_fsdp, 2)], ids=["ddp", "fsdp"])
def test_a_broken_step_is_left_out_and_its_batch_kept(command, world, codes, tmp_path):
    flags = ["--code-path", codes, "--max-steps", 26, "--run-dir", tmp_path, "--on-bad-loss", "skip", "--ema",
             "--spike-threshold", 5, "--consolidated", "last"]  # fmt: skip
    in_processes(world, broken_training, command, {4: float("nan"), 25: 50.0}, *flags)
    assert steps_of(tmp_path) == [step for step in range(1, 27) if step not in (4, 25)]
    kept = sorted(path.name for path in (tmp_path / "bad-batches").iterdir())
    assert kept == [f"{step:07d}-rank{rank}.pt" for step in (4, 25) for rank in range(world)]
    batch = checkpoint.read(tmp_path / "bad-batches" / kept[0])["batches"][0]
    assert batch[0].shape == (4 // world, 1, 16) and batch[1].shape == (4 // world, 1)
    content = checkpoint.read(checkpoint.latest(tmp_path / "checkpoints"))
    assert content["optimizer"]["state"][0]["step"] == 24  # of 26
    assert all(value.isfinite().all() for value in content["model"].values())


@pytest.mark.parametrize("command", [train_c2i, train_c2i_fsdp], ids=["ddp", "fsdp"])
def test_a_broken_step_stops_all_processes_and_the_checkpoint_before_it_stays(command, codes, tmp_path):
    flags = ["--code-path", codes, "--max-steps", 9, "--ckpt-every", 2, "--run-dir", tmp_path]
    with pytest.raises(AssertionError, match=r"(?s)not a finite number \(nan\) at step 4.*at step 4"):
        in_processes(2, broken_training, command, {4: float("nan")}, *flags)
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "checkpoints")) == 2
    assert len(list((tmp_path / "bad-batches").iterdir())) == 2


def broken_training_on_device(command, broken, *flags):
    """As on a GPU, where no step waits for its loss."""
    step.decides_on_device = lambda device, optimizers, scaler: True
    broken_training(command, broken, *flags)


@pytest.mark.parametrize(("command", "world"), [(train_c2i, 2), (train_c2i_fsdp, 2)], ids=["ddp", "fsdp"])
def test_steps_that_the_device_leaves_out_are_those_the_host_leaves_out(command, world, codes, tmp_path):
    flags = ["--code-path", codes, "--max-steps", 26, "--on-bad-loss", "skip", "--ema", "--spike-threshold", 5,
             "--consolidated", "last", "--max-grad-norm", 0.5, "--run-dir"]  # fmt: skip
    broken = {4: float("nan"), 25: 50.0, 26: float("inf")}
    for name, trained in (("host", broken_training), ("device", broken_training_on_device)):
        in_processes(world, trained, command, broken, *flags, tmp_path / name)
    assert steps_of(tmp_path / "device") == steps_of(tmp_path / "host") == [*range(1, 4), *range(5, 25)]
    kept = [sorted(path.name for path in (tmp_path / name / "bad-batches").iterdir()) for name in ("host", "device")]
    assert kept[0] == kept[1] == [f"{step:07d}-rank{rank}.pt" for step in broken for rank in range(world)]
    host, device = (checkpoint.read(checkpoint.latest(tmp_path / name / "checkpoints")) for name in ("host", "device"))
    assert device["optimizer"]["state"][0]["step"] == 23  # of 26
    assert device["guard"]["in_a_row"] == 2 and len(device["guard"]["recent"]) == 23
    for part in ("model", "ema"):
        torch.testing.assert_close(device[part], host[part], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(device["optimizer"]["state"], host["optimizer"]["state"], rtol=1e-3, atol=1e-5)
    warned = (tmp_path / "device/log.txt").read_text().count("Skipped")
    assert warned == (tmp_path / "host/log.txt").read_text().count("Skipped") == 3


@pytest.mark.parametrize("last", [9, 4])
def test_a_broken_step_that_the_device_left_out_stops_with_its_number(last, codes, tmp_path):
    """One step late, or at the end of the training, and no checkpoint counts it."""
    flags = ["--code-path", codes, "--max-steps", last, "--ckpt-every", 2, "--run-dir", tmp_path]
    with pytest.raises(AssertionError, match=r"not a finite number \(nan\) at step 4; the weights were not changed"):
        in_processes(1, broken_training_on_device, train_c2i, {4: float("nan")}, *flags)
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "checkpoints")) == 2


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/proc/mounts"), reason="mounting a small disk needs root")
def test_a_full_disk_leaves_the_sharded_checkpoint_before(codes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=34m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        flags = ["--code-path", codes, "--max-steps", 9, "--ckpt-every", 1, "--run-dir", disk / "run"]
        with pytest.raises(AssertionError, match=r"(?s)ValueError: no space left.*ValueError: no space left"):
            in_processes(2, whole_training_of, train_c2i_fsdp, *flags)
        kept = sorted((disk / "run/checkpoints").iterdir())
        assert kept and all(checkpoint.read(path)["steps"] == checkpoint.step_of(path) for path in kept)
    finally:
        subprocess.run(["umount", disk], check=True)


def whole_training_of(command, *flags):
    train(arguments(command, *flags))


def half_training_of(command, *flags):
    """With a loss scale that fits from the first step on: sharded gradients are fp16 themselves and overflow at the
    usual one, and a step that is left out is another training."""
    step.grad_scaler = lambda device, name: torch.amp.GradScaler(device.type, init_scale=256, enabled=name == "fp16")
    whole_training_of(command, *flags)


@pytest.fixture(scope="module")
def full_precision(codes, tmp_path_factory):
    """The losses of eight steps in float32."""
    folder = tmp_path_factory.mktemp("full")
    flags = ["--code-path", codes, "--max-steps", 8, *NO_CHANCE, "--run-dir", folder]
    in_processes(1, whole_training_of, train_c2i, *flags)
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("command", "world", "precision"),
    [(train_c2i, 1, "fp16"), (train_c2i_fsdp, 2, "fp16"), (train_c2i_fsdp, 2, "bf16")],
    ids=["ddp-fp16", "fsdp-fp16", "fsdp-bf16"],
)
def test_half_precision_trains_close_to_full(command, world, precision, full_precision, codes, tmp_path):
    flags = ["--code-path", codes, "--max-steps", 8, *NO_CHANCE, "--mixed-precision", precision, "--run-dir", tmp_path]
    in_processes(world, half_training_of, command, *flags)
    half = [entry["loss"] for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert half == pytest.approx(full_precision, abs=0.02) and half != full_precision
    assert half[-1] < half[0]
