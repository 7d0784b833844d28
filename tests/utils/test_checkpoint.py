"""Every known format is read, hostile and broken files are refused, and writing is atomic."""

import argparse
import os
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from utils import checkpoint
from utils.checkpoint import CheckpointError
from utils.files import atomic_path, write_json


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def containers(state):
    """The formats in the wild, by name."""
    return {
        "ddp": {"model": state, "optimizer": {}, "steps": 7, "args": argparse.Namespace(lr=1e-4, name="x")},
        "deepspeed": {"module": state},
        "lightning": {"state_dict": state, "epoch": 3},
        "bare": state,
        "compiled": {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
        "wrapped": {"model": {f"module._fsdp_wrapped_module.{k}": v for k, v in state.items()}},
    }


@pytest.mark.parametrize("name", ["ddp", "deepspeed", "lightning", "bare", "compiled", "wrapped"])
def test_reads_every_container(model, tmp_path, name):
    torch.save(containers(model.state_dict())[name], tmp_path / "x.pt")
    assert_loads(model, tmp_path / "x.pt")


def test_reads_safetensors_and_folders(model, tmp_path):
    safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors")
    assert_loads(model, tmp_path / "x.safetensors")
    (tmp_path / "fsdp").mkdir()
    torch.save(model.state_dict(), tmp_path / "fsdp" / "consolidated.pth")
    assert_loads(model, tmp_path / "fsdp")
    (tmp_path / "hf").mkdir()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "hf" / "model.safetensors")
    assert_loads(model, tmp_path / "hf")


def assert_loads(model, path):
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    checkpoint.load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


def test_ema_is_taken_only_when_preferred(model, tmp_path):
    ema = {k: v + 1 for k, v in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "ema": ema}, tmp_path / "x.pt")
    content = checkpoint.read(tmp_path / "x.pt")
    assert torch.equal(checkpoint.state_dict_of(content, "x", prefer_ema=True)["0.bias"], ema["0.bias"])
    assert torch.equal(checkpoint.state_dict_of(content, "x")["0.bias"], model.state_dict()["0.bias"])


class Malicious:
    """Would make a folder when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, legacy):
    content = {"model": {"w": torch.zeros(1)}, "args": Malicious(tmp_path / "owned")}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="mkdir"):
        checkpoint.read(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    with pytest.raises(CheckpointError):
        checkpoint.read(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_truncated_file_is_refused(model, tmp_path, name, kept):
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save({"model": model.state_dict()}, path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=r"readable|refused"):
        checkpoint.read(path)


def test_missing_files_and_files_without_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        checkpoint.read(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"consolidated\.pth"):
        checkpoint.read(tmp_path)
    with pytest.raises(CheckpointError, match="found steps"):
        checkpoint.state_dict_of({"steps": 3}, "x.pt")


def test_another_model_is_an_error_that_says_what_differs(model, tmp_path):
    state = dict(model.state_dict())
    state.pop("0.bias")
    state["extra.weight"] = torch.zeros(2)
    state["1.weight"] = torch.zeros(5, 4)
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_weights(model, tmp_path / "x.pt", suggest=lambda weights: "it would fit --gpt-model GPT-B")
    text = str(error.value)
    for part in ("0.bias", "extra.weight", "(5, 4)", "(2, 4)", "GPT-B"):
        assert part in text


def test_ignored_prefixes_are_left_out(model, tmp_path):
    torch.save({"state_dict": {**model.state_dict(), "loss.w": torch.zeros(1)}}, tmp_path / "x.ckpt")
    checkpoint.load_weights(model, tmp_path / "x.ckpt", ignore=["loss."])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save({"steps": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"steps": lambda: 0}, path)
    assert checkpoint.read(path) == {"steps": 1}
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_sentence(tmp_path):
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(ValueError, match="no space left"), atomic_path(tmp_path / "x.json") as temporary:
        temporary.write_text("new")
        with open("/dev/full", "w") as full:
            full.write("x" * 100)
    assert (tmp_path / "x.json").read_text() == "old"


def test_latest_and_prune(tmp_path):
    for step in (5, 100, 20):
        checkpoint.save({"steps": step}, tmp_path / f"{step:07d}.pt")
    (tmp_path / "notes.pt").touch()
    assert checkpoint.latest(tmp_path).name == "0000100.pt"
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["0000020.pt", "0000100.pt", "notes.pt"]
    assert checkpoint.latest(tmp_path / "absent") is None


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"b": [1, 2]})
    assert (tmp_path / "a" / "x.json").read_text() == '{\n  "b": [\n    1,\n    2\n  ]\n}\n'


def test_weights_as_safetensors_have_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    weights = {"a": torch.arange(6).view(2, 3).T, "b": torch.nn.Parameter(torch.ones(2, dtype=torch.float16))}
    checkpoint.save_weights(weights, tmp_path / "w.safetensors", {"made": "here"})
    read = checkpoint.read(tmp_path / "w.safetensors")
    assert torch.equal(read["a"], weights["a"]) and torch.equal(read["b"], weights["b"].detach())
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["any", "w.safetensors"]
