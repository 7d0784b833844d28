"""Commands that are killed, stopped or run out of disk: started again, they end as if nothing had happened."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.codes import CodeFolder, write_codes
from tests.commands.shell import (
    EXTRACT,
    GPT_FLAGS,
    ROOT,
    TRAIN,
    VQ_FLAGS,
    VQ_SIZE,
    VQ_TRAIN,
    command_line,
    environment,
    make_images,
    run,
)  # fmt: skip
from utils import checkpoint

pytestmark = pytest.mark.slow


def start(script: str, *flags: object, processes: int = 1) -> subprocess.Popen:
    """Start a command in a process group of its own."""
    line = command_line(script, *flags, processes=processes)
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def interrupt(process: subprocess.Popen, ready: Callable[[], bool], signum: int, pause: float = 0.0) -> int:
    """Send `signum` to the whole group `pause` seconds after `ready`; returns the exit code."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline, "the command did not get going"
        time.sleep(0.01)
    time.sleep(pause)
    os.killpg(process.pid, signum)
    process.communicate(timeout=120)
    return process.returncode


def random_codes(folder: Path, count: int = 12) -> Path:
    """Codes as extraction writes them, two views of 4 x 4 codes of 64."""
    generator = np.random.default_rng(0)
    codes = CodeFolder.named(folder, "imagenet", 16)
    for i in range(count):
        write_codes(codes, i, generator.integers(0, 64, (2, 16)), i % 3)
    return folder


def has_checkpoint(run_dir: Path) -> Callable[[], bool]:
    return lambda: checkpoint.latest(run_dir / "checkpoints") is not None


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_training_killed_at_a_random_moment_ends_bit_equal(stage, tmp_path):
    if stage == "gpt":
        command = [TRAIN, *GPT_FLAGS, "--code-path", random_codes(tmp_path / "codes"), "--ema"]
    else:
        command = [VQ_TRAIN, *VQ_FLAGS, "--data-path", make_images(tmp_path / "images"), "--codebook-init", "kmeans",
                   "--revive-every", 10, "--optimizer", "muon"]  # fmt: skip
    command += ["--max-steps", 40, "--ckpt-every", 3, "--keep-last", 2]
    run(*command, "--run-dir", tmp_path / "whole")
    process = start(*command, "--run-dir", tmp_path / "killed")
    code = interrupt(process, has_checkpoint(tmp_path / "killed"), signal.SIGKILL, random.random() * 0.5)
    assert code == -signal.SIGKILL
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "killed/checkpoints")) < 40
    run(*command, "--run-dir", tmp_path / "killed")
    whole, killed = (checkpoint.read(tmp_path / name / "checkpoints/0000040.pt") for name in ("whole", "killed"))
    for part in {"model", "ema"} & whole.keys():
        assert all(torch.equal(whole[part][key], killed[part][key]) for key in whole[part]), part


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_polite_signal_saves_the_present_step(signum, code, tmp_path):
    flags = [
        *GPT_FLAGS,
        "--code-path",
        random_codes(tmp_path / "codes"),
        "--max-steps",
        100_000,
        "--run-dir",
        tmp_path / "r",
    ]
    metrics = tmp_path / "r/metrics.jsonl"
    process = start(TRAIN, *flags)
    assert interrupt(process, lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, signum) == code
    last = metrics.read_text().count("\n")
    assert checkpoint.read(checkpoint.latest(tmp_path / "r/checkpoints"))["steps"] >= last


def test_two_processes_stop_together_and_one_continues(tmp_path):
    flags = [*GPT_FLAGS, "--code-path", random_codes(tmp_path / "codes"), "--run-dir", tmp_path / "r"]
    metrics = tmp_path / "r/metrics.jsonl"
    process = start(TRAIN, *flags, "--max-steps", 100_000, processes=2)
    interrupt(process, lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, signal.SIGTERM)
    done = checkpoint.read(checkpoint.latest(tmp_path / "r/checkpoints"))["steps"]
    printed = run(TRAIN, *flags, "--max-steps", done + 2)
    assert f"steps={done}" in printed and (tmp_path / f"r/checkpoints/{done + 2:07d}.pt").is_file()


def test_extraction_killed_at_a_random_moment_ends_complete(tmp_path):
    images = make_images(tmp_path / "images", per_class=40)
    run(VQ_TRAIN, *VQ_FLAGS, "--data-path", images, "--max-steps", 1, "--run-dir", tmp_path / "vq")
    flags = [*VQ_SIZE, "--vq-ckpt", tmp_path / "vq/checkpoints/0000001.pt", "--data-path", images, "--num-workers", 0,
             "--batch-size", 1, "--layout", "files"]  # fmt: skip
    run(EXTRACT, *flags, "--code-path", tmp_path / "whole")
    folder = tmp_path / "killed/imagenet16_codes"
    process = start(EXTRACT, *flags, "--code-path", tmp_path / "killed")
    interrupt(process, lambda: folder.is_dir() and len(list(folder.glob("*.npy"))) > 2, signal.SIGKILL)
    assert len(list(folder.glob("*.npy"))) < 120
    run(EXTRACT, *flags, "--code-path", tmp_path / "killed")
    whole, killed = (CodeFolder.named(tmp_path / name, "imagenet", 16) for name in ("whole", "killed"))
    assert killed.indices() == list(range(120))
    assert all(np.array_equal(whole.read(i)[0], killed.read(i)[0]) for i in range(120))


def test_rendering_killed_at_a_random_moment_ends_equal(tmp_path):
    flags = ["--size", 24, "--limit", 60]
    run("dataset/openmoji.py", *flags, "--data-path", tmp_path / "whole")
    process = start("dataset/openmoji.py", *flags, "--data-path", tmp_path / "killed")
    interrupt(process, lambda: any((tmp_path / "killed").rglob("*.png")), signal.SIGKILL)
    run("dataset/openmoji.py", *flags, "--data-path", tmp_path / "killed")
    whole, killed = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.png")}
                     for n in ("whole", "killed"))  # fmt: skip
    assert whole == killed and len(whole) == 60


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/proc/mounts"), reason="mounting a small disk needs root")
def test_a_full_disk_stops_with_one_sentence_and_leaves_the_old_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        flags = [*GPT_FLAGS, "--code-path", random_codes(tmp_path / "codes"), "--run-dir", disk / "run"]
        printed = run(TRAIN, *flags, "--max-steps", 9, "--ckpt-every", 1, code=2)
        assert "no space left on the disk" in printed and "Traceback" not in printed
        kept = list((disk / "run/checkpoints").iterdir())
        assert kept and all(checkpoint.read(path)["steps"] == checkpoint.step_of(path) for path in kept)
    finally:
        subprocess.run(["umount", disk], check=True)
