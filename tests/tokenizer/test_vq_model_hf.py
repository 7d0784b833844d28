"""Saving and loading the tokenizer in the Hugging Face layout."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tokenizer.builders import tiny_vq
from tokenizer.tokenizer_image.vq_model_hf import VQ_models_HF, VQModelHF


def test_round_trip(tmp_path):
    model = VQModelHF(tiny_vq(codebook_size=32).config)
    model.save_pretrained(tmp_path)
    loaded = VQModelHF.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.state_dict().items())
    assert {"config.json", "model.safetensors", "README.md"} == {p.name for p in tmp_path.iterdir()}
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card and "- llamagen" in card and "- text-to-image" in card


@pytest.mark.parametrize("kind", ["fsq", "lfq", "ema", "ibq"])
def test_other_quantizers_travel_along(kind, tmp_path):
    model = VQModelHF(tiny_vq(quantizer=kind, fsq_levels=[5, 3] if kind == "fsq" else None).config)
    model.save_pretrained(tmp_path)
    loaded = VQModelHF.from_pretrained(tmp_path)
    assert loaded.config == model.config and type(loaded.quantize) is type(model.quantize)
    assert torch.equal(loaded.quantize.codebook(), model.quantize.codebook())


def test_published_config(tmp_path):
    """The config of the published sizes has exactly the ten fields other readers know, flat."""
    with torch.device("meta"):
        model = VQ_models_HF["VQ-16"]()
    assert json.loads(json.dumps(model._hub_mixin_config)) == {
        "codebook_embed_dim": 8,
        "codebook_l2_norm": True,
        "codebook_show_usage": True,
        "codebook_size": 16384,
        "commit_loss_beta": 0.25,
        "decoder_ch_mult": [1, 1, 2, 2, 4],
        "dropout_p": 0.0,
        "encoder_ch_mult": [1, 1, 2, 2, 4],
        "entropy_loss_ratio": 0.0,
        "z_channels": 256,
    }
    assert isinstance(model, VQModelHF) and set(VQ_models_HF) == {"VQ-16", "VQ-8"}


def test_missing_weights_are_an_error(tmp_path):
    VQModelHF(tiny_vq().config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"decoder\.conv_out\.bias"):
        VQModelHF.from_pretrained(tmp_path)
