"""What training does on a GPU alone: no step waits for the device, all compute what a CPU computes, engines sample."""

import logging

import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.noise import ImageNoise
from autoregressive.train.live_sampling import LiveSampler, sampling_copy
from autoregressive.train.step import TrainStep
from autoregressive.train.train_c2i import parser
from tests.autoregressive.models.tiny import random_model
from tests.autoregressive.train.stores import C2I, CLASSES, TOKENS, VOCABULARY
from utils.guard import LossGuard
from utils.trainer import REFUSED, _Window

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
FLAGS = [*C2I, "--code-path", "none", "--lr", "0.003", "--ema", "--no-compile", "--max-grad-norm", "0.5",
         "--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]  # fmt: skip


def make_step(device, folder, *flags):
    guard = LossGuard("skip", 5.0, folder, logging.getLogger("test"))
    return TrainStep(parser().parse_args([*FLAGS, *flags]), torch.device(device), total_steps=20, guard=guard)


def batch():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(VOCABULARY, (4, 1, TOKENS), generator=generator)
    return codes, torch.randint(CLASSES, (4, 1), generator=generator)


@needs_gpu
def test_no_step_waits_for_the_device(tmp_path):
    step, window = make_step("cuda", tmp_path, "--mixed-precision", "bf16"), _Window(torch.device("cuda"))
    pinned = [part.pin_memory() for part in batch()]
    step([pinned], 1)  # some things are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 6):
            window.add(step([pinned], number))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.settle()
    assert len(step.guard.recent) == 5 and step.guard.recent[-1] == pytest.approx(window.values["loss"][-1].item())


@needs_gpu
def test_losses_weights_and_averages_are_those_of_a_cpu(tmp_path):
    ends = []
    for device in ("cpu", "cuda"):
        step = make_step(device, tmp_path / device, "--mixed-precision", "fp32")
        losses = [step([batch()], number)["loss"].item() for number in range(1, 11)]
        parts = [torch.nn.utils.parameters_to_vector(part.parameters()).cpu() for part in (step.model, step.ema)]
        ends.append((torch.tensor(losses), *parts))
    assert ends[0][0][0] > ends[0][0][-1] + 0.1
    torch.testing.assert_close(ends[1][0], ends[0][0], rtol=1e-4, atol=1e-4)
    for found, expected in zip(ends[1][1:], ends[0][1:]):
        assert (found - expected).norm() < 1e-2 * expected.norm()


@needs_gpu
def test_a_step_without_a_finite_loss_changes_nothing(tmp_path):
    step = make_step("cuda", tmp_path, "--mixed-precision", "bf16")
    step([batch()], 1)
    usual = step._backward
    step._backward = lambda batch, share, last: usual(batch, share * float("nan"), last)
    kept = [{name: value.clone() for name, value in part.state_dict().items()} for part in (step.model, step.ema)]
    assert step([batch()], 2)[REFUSED].item() == 1
    step.settle()
    for part, before in zip((step.model, step.ema), kept):
        torch.testing.assert_close(dict(part.state_dict()), before, rtol=0, atol=0)
    assert step.optimizers.members[0].state[step.model.output.weight]["step"].item() == 1
    assert step.guard.in_a_row == 1 and (tmp_path / "0000002-rank0.pt").is_file()


@needs_gpu
@pytest.mark.parametrize("images", [3, 48], ids=["fused", "wide"])
def test_an_engine_samples_and_leaves_no_memory_behind(images):
    model = random_model(vocab_size=VOCABULARY, block_size=TOKENS, num_classes=CLASSES).cuda().train()
    labels, seeds, held = torch.arange(images, device="cuda") % CLASSES, range(images), []
    sampler = LiveSampler("none", 2.0, sharded=False)
    for _ in range(3):
        with sampler.sampling(model) as sample:
            codes = sample(labels, seeds, None).cpu()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[1] == held[2] and sampler._fits and model.training
    own = sampling_copy(model, "none").cpu()
    expected = generate(own, labels.cpu(), TOKENS, cfg_scale=2.0, generators=ImageNoise(seeds))
    assert (codes == expected).float().mean() > 0.9  # a near tie may fall otherwise, and what follows it too
