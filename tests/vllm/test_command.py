"""autoregressive/serve/sample_c2i.py on vLLM draws the pictures of the own engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT_models
from autoregressive.serve import sample_c2i
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import checkpoint


@pytest.fixture
def flags(tmp_path) -> list[str]:
    torch.manual_seed(0)
    gpt = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3)
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    checkpoint.save({"model": gpt.state_dict()}, tmp_path / "gpt.pt")
    checkpoint.save({"model": VQ_models["VQ-4-S"](codebook_size=64).state_dict()}, tmp_path / "vq.pt")
    return [
        "--gpt-model", "GPT-XS", "--num-classes", "3", "--image-size", "16", "--downsample-size", "4",
        "--vq-model", "VQ-4-S", "--codebook-size", "64", "--gpt-ckpt", str(tmp_path / "gpt.pt"),
        "--vq-ckpt", str(tmp_path / "vq.pt"), "--precision", "none", "--class-labels", "0", "1", "2", "2", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("scale", ["4.0", "1.0"])
def test_pictures(flags, tmp_path, monkeypatch, capsys, scale):
    monkeypatch.chdir(tmp_path)
    args = sample_c2i.parser().parse_args([*flags, "--cfg-scale", scale, "--top-k", "0", "--seed", "3"])
    sample_c2i.main(args)
    printed = capsys.readouterr().out
    assert "drawing with vLLM" in printed
    assert "gpt sampling takes about" in printed
    assert "decoder takes about" in printed
    picture = np.asarray(Image.open("sample_c2i_vllm.png"))
    assert len(list(tmp_path.glob("gpt.pt.vllm-*"))) == 1

    monkeypatch.setattr(sample_c2i, "vllm_installed", lambda: False)
    sample_c2i.main(args)
    assert "vLLM is not installed" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open("sample_c2i_vllm.png")), picture)
