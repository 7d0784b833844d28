"""Saving to and loading from a folder in the hub's format."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoregressive.models import gpt_hf
from autoregressive.models.gpt import GPT_models, ModelArgs
from autoregressive.models.gpt_hf import GPT_models_HF, TransformerHF
from tests.autoregressive.models.tiny import random_model


@pytest.fixture(params=["c2i", "t2i"])
def config(request) -> ModelArgs:
    prefix = 1 if request.param == "c2i" else 3
    return random_model(model_type=request.param, cls_token_num=prefix, n_kv_head=2).config


def test_round_trip_through_a_folder(config, tmp_path):
    model = TransformerHF(config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelArgs)}
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    loaded = TransformerHF.from_pretrained(tmp_path)
    assert isinstance(loaded.config, ModelArgs) and loaded.config == config
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_weights_that_do_not_fit_are_refused(config, tmp_path):
    model = TransformerHF(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "freqs_cis": torch.zeros(2)}, tmp_path / "model.safetensors")
    TransformerHF.from_pretrained(tmp_path)
    del weights["norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        TransformerHF.from_pretrained(tmp_path)


def test_all_sizes_are_there():
    assert list(GPT_models_HF) == list(GPT_models)
    assert gpt_hf.GPT_3B is GPT_models_HF["GPT-3B"]
    model = gpt_hf.GPT_XS(vocab_size=16)
    assert isinstance(model, TransformerHF) and model.config.dim == 128
