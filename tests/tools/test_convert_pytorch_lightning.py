"""Weights come out of Lightning files without any object of the file coming to life."""

from __future__ import annotations

import os
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.convert_pytorch_lightning_to_torch import PUBLISHED, convert, parser, read_state_dict
from utils import checkpoint


class Attack:
    """Runs a command when it is unpickled by pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def weights() -> OrderedDict:
    return OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.float16))


@pytest.fixture
def lightning(weights, tmp_path):
    """A file as Lightning writes it, with objects of a package that is gone afterwards."""
    module = types.ModuleType("long_gone.callbacks")
    exec(
        "class Checkpoint:\n def __init__(self): self.best = 1.5\nclass Bag(dict): pass",
        module.__dict__,
    )
    for name in ("Checkpoint", "Bag"):
        getattr(module, name).__module__ = module.__name__
    sys.modules["long_gone"], sys.modules[module.__name__] = types.ModuleType("long_gone"), module
    content = {
        "epoch": 3,
        "callbacks": {module.Checkpoint: {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": [module.Checkpoint(), module.Bag(x=1), np.float64(0.5), np.dtype("int8")],
        "state_dict": OrderedDict(weights, note=module.Checkpoint()),
    }
    torch.save(content, tmp_path / "last.ckpt")
    del sys.modules["long_gone"], sys.modules[module.__name__]
    return tmp_path / "last.ckpt"


def test_the_weights_come_out_bit_for_bit(lightning, weights, capsys):
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.read(lightning)
    (target,) = convert([str(lightning)])
    assert target == lightning.with_suffix(".pth") and f"saving to {target}" in capsys.readouterr().out
    read = checkpoint.read(target)
    assert read.keys() == {"state_dict"} and read["state_dict"].keys() == weights.keys()
    assert all(torch.equal(read["state_dict"][k], v) and read["state_dict"][k].dtype == v.dtype
               for k, v in weights.items())  # fmt: skip
    assert "long_gone" not in sys.modules


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_hostile_objects_stay_dead(weights, tmp_path, place):
    marker, path = tmp_path / "ran", tmp_path / "bad.ckpt"
    if place == "beside":
        torch.save({"callbacks": Attack(marker), "state_dict": weights}, path)
    else:
        torch.save({"state_dict": {**weights, "x": Attack(marker)}}, path)
    try:
        assert read_state_dict(path).keys() == weights.keys()
    except checkpoint.CheckpointError as error:
        assert "not a readable Lightning checkpoint" in str(error)
    assert not marker.exists()


def test_one_bad_file_does_not_stop_the_others(lightning, tmp_path):
    whole = lightning.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    names = ["absent", "cut", "text", "other", "list", "last"]
    with pytest.raises(ValueError, match="1 of 6 files were converted") as error:
        convert([str(tmp_path / f"{name}.ckpt") for name in names])
    assert all(f"{name}.ckpt" in str(error.value) for name in names[:-1])
    assert (tmp_path / "last.pth").is_file() and not (tmp_path / "cut.pth").exists()


def test_without_paths_the_published_ones_are_converted(tmp_path, monkeypatch):
    assert parser().parse_args([]).paths == PUBLISHED == [
        "pretrained_models/vqgan_imagenet_f16_1024/ckpts/last.ckpt",
        "pretrained_models/vqgan_imagenet_f16_16384/ckpts/last.ckpt",
        "pretrained_models/vq-f8-n256/model.ckpt",
        "pretrained_models/vq-f8/model.ckpt",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="0 of 4 files were converted; there is no pretrained_models"):
        convert(parser().parse_args([]).paths)
