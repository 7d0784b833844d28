"""Starts commands in processes of their own."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests.processes import free_port

ROOT = Path(__file__).parents[2]
VQ_TRAIN = "tokenizer/tokenizer_image/vq_train.py"
EXTRACT = "autoregressive/train/extract_codes_c2i.py"
TRAIN = "autoregressive/train/train_c2i.py"
SAMPLE = "autoregressive/sample/sample_c2i.py"

# 16-pixel images, 4 x 4 codes of 64, GPT-XS: every stage takes seconds
VQ_SIZE = ["--vq-model", "VQ-4-S", "--codebook-size", "64", "--image-size", "16"]
GPT_SIZE = ["--gpt-model", "GPT-XS", "--num-classes", "3", "--image-size", "16", "--downsample-size", "4"]
VQ_FLAGS = [*VQ_SIZE, "--perceptual-weight", "0", "--disc-weight", "0", "--global-batch-size", "4", "--log-every", "1",
            "--num-workers", "0", "--mixed-precision", "none", "--val-features", "none"]  # fmt: skip
GPT_FLAGS = [*GPT_SIZE, "--vocab-size", "64", "--global-batch-size", "4", "--log-every", "1", "--num-workers", "0",
             "--mixed-precision", "none"]  # fmt: skip


def environment() -> dict[str, str]:
    """This process's environment without the variables that would help a command find its modules or its rank."""
    hidden = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{k: v for k, v in os.environ.items() if k not in hidden}, "OMP_NUM_THREADS": "1"}


def command_line(script: str, *flags: object, processes: int = 1) -> list[str]:
    """The command for one process, or for several under torchrun."""
    if processes == 1:
        return [sys.executable, script, *map(str, flags)]
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    return [*launcher, script, *map(str, flags)]


def run(script: str, *flags: object, processes: int = 1, code: int = 0, cwd: Path = ROOT) -> str:
    """Run a command to its end, check its exit code, and return what it printed."""
    line = command_line(script, *flags, processes=processes)
    done = subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"{line} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout + done.stderr


def refused(script: str, *flags: object) -> str:
    """What a command says when it ends with code 2. It runs in this process, which saves seconds of imports: for
    mistakes that are found before any work."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, *map(str, flags)]),
        mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 2, said.getvalue()
    return said.getvalue()


def stand_ins(folder: Path, scripts: dict[str, str]) -> Path:
    """Commands to put in front of the path: bash scripts by their names. Returns their folder."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def launcher_output(stand_ins: Path, launcher: str, *flags: str, **variables: str) -> list[str]:
    """The lines that a launcher of scripts/ prints, started in and with the folder of stand-ins."""
    env = {**environment(), "PATH": f"{stand_ins}:/usr/bin:/bin", **variables}
    line = ["bash", str(ROOT / "scripts" / launcher), *flags]
    return subprocess.run(line, cwd=stand_ins, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def make_images(folder: Path, per_class: int = 4) -> Path:
    """Three classes of 20 x 20 pixel pictures: a bright square on one of three colours."""
    generator = np.random.default_rng(0)
    for label, colour in {"blue": (40, 60, 200), "green": (60, 180, 60), "red": (210, 40, 40)}.items():
        (folder / label).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.full((20, 20, 3), colour, dtype=np.uint8) + generator.integers(
                0, 20, (20, 20, 3), dtype=np.uint8
            )
            row, column = generator.integers(0, 12, 2)
            pixels[row : row + 6, column : column + 6] = 250
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder
