"""The tokenizer's training as a command: two processes like one, and killed with everything on."""

import random
import signal

import numpy as np
import pytest
import torch

from tests.commands.shell import VQ_FLAGS, VQ_TRAIN, make_images, run
from tests.commands.test_faults import has_checkpoint, interrupt, start
from tests.processes import command_in_processes
from tokenizer.tokenizer_image import vq_train
from utils import checkpoint
from utils.logger import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "images")


def test_two_processes_learn_running_means_and_revive_like_one(images, tmp_path):
    flags = [*VQ_FLAGS, "--data-path", images, "--val-data-path", images, "--quantizer", "ema", "--max-steps", 6,
             "--revive-every", 2, "--codebook-init", "kmeans", "--lr", 1e-5, "--ema"]  # fmt: skip
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        command_in_processes(processes, vq_train, vq_train.train, *flags, "--run-dir", run_dir)
    one, two = (checkpoint.read(tmp_path / str(p) / "checkpoints/0000006.pt") for p in (1, 2))
    for part in ("model", "ema"):
        for key in ("cluster_size", "cluster_sum", "embedding.weight"):
            key = f"quantize.{key}"
            close = torch.isclose(one[part][key], two[part][key], atol=1e-3)
            assert close.float().mean() > 0.97, (part, key)  # a latent on the border of two codes may change sides
    logs = [list(read_metrics(tmp_path / str(p) / "metrics.jsonl")) for p in (1, 2)]
    for name in ("loss", "codebook_usage", "val/psnr", "val/ssim", "val/codebook_usage", "val/ema_perplexity"):
        values = [[entry[name] for entry in log if name in entry] for log in logs]
        assert values[0] == pytest.approx(values[1], abs=0.02), name


def test_training_with_everything_on_is_killed_and_ends_bit_equal(images, tmp_path):
    command = [VQ_TRAIN, *VQ_FLAGS, "--data-path", images, "--image-size", 24, "--quantizer", "ema", "--ema",
               "--disc-weight", 0.5, "--disc-start", 3, "--disc-layers", 2, "--disc-adaptive-weight",
               "--mixed-precision", "fp16",
               "--gradient-accumulation-steps", 2, "--gradient-checkpointing", "--warmup-steps", 3, "--lr-schedule",
               "cosine", "--max-steps", 10, "--ckpt-every", 2, "--keep-last", 2]  # fmt: skip
    run(*command, "--run-dir", tmp_path / "whole")
    process = start(*command, "--run-dir", tmp_path / "killed")
    interrupt(process, has_checkpoint(tmp_path / "killed"), signal.SIGKILL, random.random() * 0.5)
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "killed/checkpoints")) < 10
    run(*command, "--run-dir", tmp_path / "killed")
    whole, killed = (checkpoint.read(tmp_path / name / "checkpoints/0000010.pt") for name in ("whole", "killed"))
    for part in ("model", "ema", "discriminator"):
        assert all(torch.equal(whole[part][key], killed[part][key]) for key in whole[part]), part
    assert whole["scaler"] == killed["scaler"] and whole["scaler_disc"] == killed["scaler_disc"]
    metrics = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    losses = [{entry["step"]: entry["loss"] for entry in log} for log in metrics]
    assert losses[0] == losses[1] and np.isfinite(list(losses[0].values())).all()
