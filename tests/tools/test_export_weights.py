"""Weights alone: what is stored, and that commands read it like the checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

from tools import export_weights as tool
from utils import checkpoint

WEIGHTS = {"a.weight": torch.tensor([1.0, 0.1, 3e4]), "count": torch.tensor(7)}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "0000010.pt"
    averaged = {key: value + 1 for key, value in WEIGHTS.items()}
    checkpoint.save({"model": WEIGHTS, "ema": averaged, "optimizer": {}, "steps": 10}, path)
    return path


def export(source, output, *flags):
    tool.main(tool.parser().parse_args(["--ckpt", str(source), "--output", str(output), *flags]))
    return load_file(output)


def test_averaged_weights_in_half_precision_and_the_step_count_as_it_is(source, tmp_path, capsys):
    stored = export(source, tmp_path / "w.safetensors", "--precision", "fp16")
    assert stored["a.weight"].dtype == torch.float16 and stored["a.weight"].tolist() == [2.0, 1.099609375, 30000.0]
    assert stored["count"].dtype == torch.int64 and int(stored["count"]) == 8
    assert "w.safetensors: 0.0 MB" in capsys.readouterr().out


def test_own_weights_come_back_as_they_were(source, tmp_path):
    export(source, tmp_path / "w.safetensors", "--no-ema")
    read = checkpoint.state_dict_of(checkpoint.read(tmp_path / "w.safetensors"), "w")
    assert read.keys() == WEIGHTS.keys() and all(torch.equal(read[key], WEIGHTS[key]) for key in WEIGHTS)


def test_weights_too_large_for_the_format_are_refused_and_nothing_is_written(tmp_path):
    checkpoint.save({"model": {"w": torch.tensor([1e6])}}, tmp_path / "big.pt")
    with pytest.raises(ValueError, match=r"w in .*cannot hold"):
        export(tmp_path / "big.pt", tmp_path / "w.safetensors", "--precision", "fp16")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export(tmp_path / "big.pt", tmp_path / "w.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["big.pt"]
