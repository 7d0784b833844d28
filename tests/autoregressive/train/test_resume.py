"""A training that stops and continues, with as many processes or others, sharded or not, is one that never stopped."""

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from autoregressive.models.gpt import GPT_models
from autoregressive.train import train_c2i, train_c2i_fsdp
from autoregressive.train.recipe import train
from tests.commands.shell import GPT_FLAGS
from tests.commands.test_faults import random_codes
from tests.processes import in_processes
from utils import checkpoint, sharded_files
from utils.logger import read_metrics

NO_CHANCE = ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]
FP32 = ["--mixed-precision", "fp32"]
MUON = ["--optimizer", "muon"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    return random_codes(tmp_path_factory.mktemp("codes"))


def training(command, *flags):
    train(command.parser().parse_args([*map(str, [*GPT_FLAGS, "--ema", "--lr", "1e-3", *flags])]))


def run(command, world, codes, folder, steps, *flags):
    """Train to step `steps`; the schedule is that of six steps in any case."""
    flags = [*flags, "--lr-schedule", "constant", "--warmup-steps", 6, "--ckpt-every", 100]
    in_processes(world, training, command, "--code-path", codes, "--run-dir", folder, "--max-steps", steps, *flags)
    return folder


def losses(folder):
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")]


def newest(folder):
    return checkpoint.read(checkpoint.latest(folder / "checkpoints"))


def assert_same(one, other, **tolerance):
    for part in ("model", "ema"):
        torch.testing.assert_close(one[part], other[part], **tolerance)
    for state, expected in zip(states(other), states(one), strict=True):
        torch.testing.assert_close(state, expected, **tolerance)


def states(content):
    """The states of all optimizers by number of the parameter; a sharded checkpoint has the optimizers by number."""
    members = content["optimizer"].get("members", [content["optimizer"]])
    return [member["state"] for member in (members.values() if isinstance(members, dict) else members)]


@pytest.mark.parametrize(
    ("command", "flags"),
    [(train_c2i, []), (train_c2i_fsdp, []), (train_c2i_fsdp, MUON)],
    ids=["ddp", "fsdp", "fsdp-muon"],
)
def test_bit_equal_with_dropout_when_nothing_changes(command, flags, codes, tmp_path):
    """Bit-equal, not only close: draws, data, moments, averages and schedule are where they were."""
    for folder, steps in (("whole", 6), ("parts", 2), ("parts", 6)):
        run(command, 2, codes, tmp_path / folder, steps, *flags)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "parts"), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "commands",
    [(train_c2i, train_c2i, train_c2i), (train_c2i_fsdp,) * 3, (train_c2i_fsdp, train_c2i, train_c2i_fsdp)],
    ids=["ddp", "fsdp", "fsdp-ddp-fsdp"],
)
def test_two_processes_then_one_then_two(commands, codes, tmp_path):
    run(train_c2i, 1, codes, tmp_path / "one", 6, *NO_CHANCE)
    for command, world, steps in zip(commands, (2, 1, 2), (2, 4, 6)):
        exact = FP32 if command is train_c2i_fsdp else []
        run(command, world, codes, tmp_path / "many", steps, *NO_CHANCE, *exact)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "many"), abs=2e-5)
    assert_same(newest(tmp_path / "one"), newest(tmp_path / "many"), atol=3e-5, rtol=1e-3)


def test_muon_continues_sharded_then_whole_then_sharded(codes, tmp_path):
    run(train_c2i, 1, codes, tmp_path / "one", 3, *NO_CHANCE, *MUON)
    for command, world, steps in ((train_c2i_fsdp, 2, 1), (train_c2i, 1, 2), (train_c2i_fsdp, 2, 3)):
        exact = FP32 if command is train_c2i_fsdp else []
        run(command, world, codes, tmp_path / "many", steps, *NO_CHANCE, *MUON, *exact)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "many"), abs=2e-5)
    one, many = newest(tmp_path / "one"), newest(tmp_path / "many")
    assert_same(one, many, atol=3e-5, rtol=1e-3)
    assert {name for state in states(many)[0].values() for name in state} == {"momentum_buffer"}


@pytest.fixture(scope="module")
def sharded(codes, tmp_path_factory) -> Path:
    """A sharded checkpoint of two processes after three steps."""
    folder = run(train_c2i_fsdp, 2, codes, tmp_path_factory.mktemp("sharded"), 3, *NO_CHANCE, *FP32)
    return folder / "checkpoints/0000003"


def test_a_sharded_checkpoint_holds_the_established_weights_too(sharded):
    established = torch.load(sharded / "consolidated.pth", weights_only=True)
    model = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3, class_dropout_prob=0.0)
    model.load_state_dict(established)
    torch.testing.assert_close(dict(model.state_dict()), checkpoint.read(sharded)["model"], atol=0, rtol=0)
    assert (sharded / "resume_step.txt").read_text() == "3\n"
    assert checkpoint.read(sharded)["args"]["data_parallel"] == "fsdp"


def test_weights_alone_are_read_from_a_sharded_checkpoint(sharded):
    assert checkpoint.read(sharded, parts=("ema",)).keys() == {"ema", "steps", "args"}
    model = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3, class_dropout_prob=0.0)
    checkpoint.load_weights(model, sharded, prefer_ema=True)
    torch.testing.assert_close(dict(model.state_dict()), checkpoint.read(sharded)["ema"], atol=0, rtol=0)


def as_upstream_writes(sharded: Path, folder: Path, world: int) -> Path:
    """A folder of the established sharded trainer: whole weights, and slices of the flattened moments."""
    folder.mkdir()
    shutil.copy(sharded / "consolidated.pth", folder)
    (folder / "resume_step.txt").write_text("3\n")
    optimizer = checkpoint.read(sharded)["optimizer"]
    for rank in range(world):
        state = {}
        for index, moments in optimizer["state"].items():
            pieces = {name: value.flatten().tensor_split(world)[rank] for name, value in moments.items() if value.ndim}
            if pieces["exp_avg"].numel():
                state[index] = {"step": moments["step"], **pieces}
        groups = [{**group, "betas": tuple(group["betas"])} for group in optimizer["param_groups"]]
        torch.save({"state": state, "param_groups": groups}, folder / f"optimizer.{rank:05d}-of-{world:05d}.pth")
    return folder


@pytest.mark.parametrize("command", [train_c2i, train_c2i_fsdp], ids=["ddp", "fsdp"])
def test_the_established_sharded_trainers_folder_continues(command, sharded, codes, tmp_path):
    """Written by 3 processes, continued by 2: as our own checkpoint of the same state continues."""
    given = as_upstream_writes(sharded, tmp_path / "0000003", world=3)
    flag = "--gpt-ckpt" if command is train_c2i else "--gpt-resume"
    run(command, 2, codes, tmp_path / "theirs", 6, *NO_CHANCE, flag, given)
    run(command, 2, codes, tmp_path / "ours", 6, *NO_CHANCE, flag, sharded)
    assert losses(tmp_path / "theirs") == losses(tmp_path / "ours") and len(losses(tmp_path / "ours")) == 3
    theirs, ours = newest(tmp_path / "theirs"), newest(tmp_path / "ours")
    torch.testing.assert_close(theirs["model"], ours["model"], atol=0, rtol=0)
    assert theirs["optimizer"]["state"][0]["step"] == 6


def test_the_established_ddp_file_continues_and_the_commands_rate_wins(codes, tmp_path):
    """A file with a Namespace inside and moments, as train_c2i.py of the established project writes it."""
    run(train_c2i, 1, codes, tmp_path / "start", 3)
    ours = checkpoint.latest(tmp_path / "start/checkpoints")
    content = checkpoint.read(ours)
    established = {name: content[name] for name in ("model", "ema", "optimizer", "steps")}
    for group in established["optimizer"]["param_groups"]:
        group["lr"] = 123.0
    (tmp_path / "theirs").mkdir()
    torch.save({**established, "args": argparse.Namespace(lr=123.0)}, tmp_path / "theirs/0000003.pt")
    for name, given in (("a", ours), ("b", tmp_path / "theirs/0000003.pt")):
        run(train_c2i, 1, codes, tmp_path / name, 5, "--gpt-ckpt", given)
    assert_same(newest(tmp_path / "a"), newest(tmp_path / "b"), atol=0, rtol=0)
    assert [group["lr"] for group in newest(tmp_path / "b")["optimizer"]["param_groups"]] == [1e-3 * 5 / 6] * 2


def test_missing_optimizer_files_are_said(sharded, codes, tmp_path):
    given = as_upstream_writes(sharded, tmp_path / "0000003", world=3)
    (given / "optimizer.00001-of-00003.pth").unlink()
    with pytest.raises(AssertionError, match=r"ValueError.*2 of 3 processes"):
        run(train_c2i, 1, codes, tmp_path / "run", 6, *NO_CHANCE, "--gpt-ckpt", given)


def test_only_the_newest_sharded_checkpoints_are_kept_and_leftovers_go(codes, tmp_path):
    (tmp_path / "checkpoints/.0000001.tmp").mkdir(parents=True)
    flags = ["--code-path", codes, "--run-dir", tmp_path, "--max-steps", 5, "--ckpt-every", 1, "--keep-last", 2]
    in_processes(1, training, train_c2i_fsdp, *flags, "--consolidated", "last")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["0000004", "0000005"]
    assert not (tmp_path / "checkpoints/0000004/consolidated.pth").exists()
    assert (tmp_path / "checkpoints/0000005/consolidated.pth").exists()


def test_established_folders_of_the_sharded_trainer(codes, tmp_path):
    flags = ["--code-path", codes, "--results-dir", tmp_path / "results", "--cloud-save-path", tmp_path / "cloud"]
    in_processes(1, training, train_c2i_fsdp, *flags, "--max-steps", 2, "--ckpt-every", 1)
    (run_folder,) = (tmp_path / "results").iterdir()
    assert run_folder.name.removesuffix("-GPT-XS").isdigit() and len(run_folder.name) == 14 + len("-GPT-XS")
    assert (run_folder / "log.txt").is_file() and not (run_folder / "checkpoints").exists()
    assert sorted(os.listdir(tmp_path / "cloud" / run_folder.name)) == ["0000001", "0000002"]


class Hostile:
    """Calls a function when unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def copy_of(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "0000003"))


def test_hostile_lists_of_tensors_are_refused_and_not_run(sharded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = copy_of(sharded, tmp_path)
    for content, message in (
        (Hostile(os.system, "touch hostile-code-ran"), r"posix\.system has no place there"),
        (Hostile(getattr, Metadata, "__init__"), "getattr of <class .*Metadata'> has no place there"),
    ):
        (hostile / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            checkpoint.read(hostile)
    assert not Path("hostile-code-ran").exists()


@pytest.mark.parametrize(
    "reduced",
    [lambda one, _: (type(one), (one.value,)), lambda one, _: (getattr, (type(one), one.name))],
    ids=["by its value", "by its name"],
)
def test_lists_of_tensors_of_any_python_are_read(sharded, tmp_path, monkeypatch, reduced):
    """Python 3.11.0 to 3.11.3 write members of an enum by their names."""
    copy = copy_of(sharded, tmp_path)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduced)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    weights, expected = checkpoint.read(copy)["model"], checkpoint.read(sharded)["model"]
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def test_damaged_and_incomplete_sharded_checkpoints_are_said(sharded, tmp_path):
    damaged = copy_of(sharded, tmp_path)
    piece = damaged / "__1_0.distcp"
    piece.write_bytes(piece.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        checkpoint.read(damaged)
    piece.unlink()
    with pytest.raises(ValueError, match="damaged or incomplete"):
        checkpoint.read(damaged)
    (damaged / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="not the list of tensors"):
        checkpoint.read(damaged)


def test_a_sharded_checkpoint_of_another_model_is_said(sharded, codes, tmp_path):
    with pytest.raises(AssertionError, match=r"CheckpointError: .*is for another model.*--gpt-model GPT-XS"):
        run(train_c2i_fsdp, 1, codes, tmp_path, 6, *NO_CHANCE, "--gpt-model", "GPT-S", "--gpt-resume", sharded)


def test_tensors_are_split_from_plain_values():
    content = {
        "model": {"a.weight": torch.arange(4.0)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(2.0)}, 10: {"exp_avg": torch.ones(2, 2)}},
            "groups": [{"lr": 1}],
        },
        "members": [{"state": {0: {"momentum": torch.ones(3)}}, "groups": [{"lr": 2}]}, {"groups": [{"lr": 3}]}],
        "guard": {"recent": [1.0, 2.0]},
        "steps": 7,
    }
    tensors, plain = sharded_files.split(content)
    assert set(tensors) == {"model/a.weight", "optimizer/state/0/step", "optimizer/state/10/exp_avg",
                            "members/0/state/0/momentum"}  # fmt: skip
    assert json.loads(json.dumps(plain)) == {
        "model": {}, "optimizer": {"state": {"0": {}, "10": {}}, "groups": [{"lr": 1}]},
        "members": {"0": {"state": {"0": {}}, "groups": [{"lr": 2}]}, "1": {"groups": [{"lr": 3}]}},
        "guard": {"recent": [1.0, 2.0]}, "steps": 7,
    }  # fmt: skip


@pytest.mark.parametrize("command", [train_c2i, train_c2i_fsdp], ids=["ddp", "fsdp"])
def test_the_loss_scale_of_fp16_and_the_recent_losses_are_restored(command, codes, tmp_path):
    flags = ["--mixed-precision", "fp16", "--spike-threshold", 8]
    run(command, 1, codes, tmp_path, 2, *flags)
    first = newest(tmp_path)
    assert first["scaler"]["_growth_tracker"] in (1, 2) and len(first["guard"]["recent"]) == 2
    run(command, 1, codes, tmp_path, 3, *flags)
    second = newest(tmp_path)
    assert second["scaler"]["_growth_tracker"] == first["scaler"]["_growth_tracker"] + 1
    assert second["guard"]["recent"][:2] == first["guard"]["recent"]
