"""One process, DDP and FSDP2 compute the same thing, whatever saves memory; checkpoints move between all of them."""

from pathlib import Path

import pytest
import torch

from autoregressive.train import train_c2i, train_c2i_fsdp
from autoregressive.train.recipe import train
from autoregressive.train.step import TrainStep
from tests.commands.shell import GPT_FLAGS
from tests.commands.test_faults import random_codes
from tests.processes import in_processes
from utils import checkpoint
from utils.logger import read_metrics

NO_CHANCE = ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]
LENGTH = ["--lr", "1e-3", "--max-steps", "6", "--ckpt-every", "2", "--ema"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    return random_codes(tmp_path_factory.mktemp("codes"))


def training(command, *flags):
    """A whole training inside this process; nothing of the answer is needed but that it ends."""
    train(command.parser().parse_args([*map(str, [*GPT_FLAGS, *NO_CHANCE, *LENGTH, *flags])]))


def run(command, world, codes, folder, *flags):
    in_processes(world, training, command, "--code-path", codes, "--run-dir", folder, *flags)
    return folder


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")}


def weights(folder, step=6):
    newest = checkpoint.latest(folder / "checkpoints")
    assert checkpoint.step_of(newest) == step
    content = checkpoint.read(newest)
    return {f"{part}.{key}": value for part in ("model", "ema") for key, value in content[part].items()}


def assert_equal_training(one, other, steps=6):
    assert losses(one).keys() == losses(other).keys() == set(range(1, steps + 1))
    assert list(losses(one).values()) == pytest.approx(list(losses(other).values()), abs=2e-5)
    torch.testing.assert_close(weights(one), weights(other), atol=3e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def alone(codes, tmp_path_factory):
    """Six steps in one process: what all the others have to give."""
    return run(train_c2i, 1, codes, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def alone_with_muon(codes, tmp_path_factory):
    return run(train_c2i, 1, codes, tmp_path_factory.mktemp("muon"), "--optimizer", "muon")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--gradient-accumulation-steps", "2"],
        ["--activation-checkpointing", "full"],
        ["--activation-checkpointing", "selective"],
    ],
    ids=lambda flags: "-".join(flags[-1:]) or "plain",
)
def test_two_ddp_processes_train_as_one(flags, alone, codes, tmp_path):
    assert_equal_training(alone, run(train_c2i, 2, codes, tmp_path, *flags))


@pytest.mark.parametrize(
    "flags",
    [
        ["--data-parallel", "fsdp"],
        ["--data-parallel", "sdp", "--gradient-accumulation-steps", "2"],
        ["--data-parallel", "hsdp", "--activation-checkpointing", "full"],
        ["--data-parallel", "hsdp", "--shard-size", "1", "--activation-checkpointing", "selective"],
    ],
    ids=lambda flags: "-".join(flags[1::2]),
)
def test_fsdp_trains_as_ddp(flags, alone, codes, tmp_path):
    other = run(train_c2i_fsdp, 2, codes, tmp_path, "--mixed-precision", "fp32", *flags)
    assert_equal_training(alone, other)


@pytest.mark.parametrize(
    "flags",
    [["fsdp"], ["sdp", "--gradient-accumulation-steps", "2"], ["hsdp", "--shard-size", "1"]],
    ids=lambda flags: flags[0],
)
def test_muon_updates_sharded_matrices_as_whole_ones(flags, alone_with_muon, codes, tmp_path):
    sharded = ["--optimizer", "muon", "--mixed-precision", "fp32", "--data-parallel", *flags]
    assert_equal_training(alone_with_muon, run(train_c2i_fsdp, 2, codes, tmp_path, *sharded))


def test_the_residual_stream_is_in_the_format_that_was_asked_for():
    found = {}
    for flags in (["bf16"], ["bf16", "--residual-dtype", "compute"], ["none", "--residual-dtype", "compute"]):
        args = train_c2i.parser().parse_args(
            [*GPT_FLAGS, *NO_CHANCE, "--code-path", "none", "--mixed-precision", *flags]
        )
        step, formats = TrainStep(args, torch.device("cpu"), total_steps=10), []
        for layer in step.model.layers:
            layer.register_forward_hook(lambda block, inputs, output, to=formats: to.append(output.dtype))
        codes = torch.randint(64, (4, 1, 16), generator=torch.Generator().manual_seed(0))
        batch = codes, torch.zeros(4, 1, dtype=torch.int64)
        loss = [step([batch], number)["loss"].item() for number in range(1, 4)]
        found[" ".join(flags)] = set(formats), loss
    (wide, usual), (short, close), (exact, _) = found.values()
    assert (wide, short, exact) == ({torch.float32}, {torch.bfloat16}, {torch.float32})
    assert close == pytest.approx(usual, abs=2e-2) and close != usual


def test_a_wide_residual_stream_is_refused_where_weights_are_sharded():
    args = train_c2i_fsdp.parser().parse_args([*GPT_FLAGS, "--code-path", "none", "--residual-dtype", "fp32"])
    with pytest.raises(ValueError, match="--residual-dtype fp32 needs --data-parallel ddp"):
        TrainStep(args, torch.device("cpu"), total_steps=10)
