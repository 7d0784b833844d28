"""The T5 encoder, with a tiny random model and a tokenizer trained here."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import constants as hub_constants
from transformers import T5EncoderModel

from language.t5 import T5Embedder

LONG = " ".join(["a photo of the red cat"] * 20)


def embedder(cache_dir, **options) -> T5Embedder:
    settings = {"local_cache": True, "cache_dir": cache_dir, "torch_dtype": torch.float32, **options}
    return T5Embedder("cpu", "tiny", **settings)


def test_features_and_mask(cache_dir):
    t5 = embedder(cache_dir)
    features, mask = t5.get_text_embeddings(["a red cat", "the dog", LONG])
    assert features.shape == (3, 120, 16)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert mask.dtype == torch.int64
    assert mask.sum(dim=1).tolist() == [4, 3, 120]  # words and end token; cut at 120
    assert (mask.diff(dim=1) <= 0).all()
    assert not t5.model.training
    assert not any(p.requires_grad for p in t5.model.parameters())


def test_valid_rows_do_not_depend_on_padding(cache_dir):
    texts = ["a red cat on the lake", "hello world"]
    short, short_mask = embedder(cache_dir, model_max_length=10).get_text_embeddings(texts)
    long, long_mask = embedder(cache_dir, model_max_length=120).get_text_embeddings(texts)
    assert short_mask.sum() == long_mask.sum()
    valid = short_mask.bool()
    assert short[valid].abs().max() > 0.1
    torch.testing.assert_close(short[valid], long[:, :10][valid], rtol=1e-5, atol=1e-5)


def test_features_are_those_of_the_bare_encoder(cache_dir):
    t5 = embedder(cache_dir)
    features, _ = t5.get_text_embeddings(["the big horse"])
    tokens = t5.tokenizer("the big horse", return_tensors="pt")
    with torch.no_grad():
        bare = T5EncoderModel.from_pretrained(cache_dir / "tiny")(**tokens).last_hidden_state
    torch.testing.assert_close(features[:, : bare.shape[1]], bare, rtol=1e-5, atol=1e-5)


def test_captions_are_cleaned_unless_told_not_to(cache_dir):
    dirty, clean = "<b>A  RED</b> cat &amp; https://example.com/ dog", "a red cat dog"
    cleaning, plain = embedder(cache_dir), embedder(cache_dir, use_text_preprocessing=False)
    assert cleaning.text_preprocessing(dirty) == clean
    assert plain.text_preprocessing("  A  RED ") == "a  red"
    got, _ = cleaning.get_text_embeddings([dirty])
    want, _ = plain.get_text_embeddings([clean])
    assert torch.equal(got, want)


def test_default_dtype_is_bfloat16(cache_dir):
    t5 = embedder(cache_dir, torch_dtype=None)
    features, _ = t5.get_text_embeddings(["a cat"])
    assert features.dtype == torch.bfloat16


def test_a_folder_works_as_name(cache_dir):
    t5 = T5Embedder("cpu", str(cache_dir / "tiny"), torch_dtype=torch.float32)
    ours, _ = t5.get_text_embeddings(["a cat"])
    assert torch.equal(ours, embedder(cache_dir).get_text_embeddings(["a cat"])[0])


def test_model_keywords_reach_the_model(cache_dir):
    t5 = embedder(cache_dir, t5_model_kwargs={"dtype": torch.float16})
    assert t5.model.dtype == torch.float16


def test_names_of_the_established_system():
    assert T5Embedder.available_models == ["t5-v1_1-xxl", "t5-v1_1-xl", "flan-t5-xl"]


def test_missing_folder_says_where_it_looked(cache_dir):
    with pytest.raises(ValueError, match=r"no T5 encoder at .*flan-t5-xl"):
        T5Embedder("cpu", "flan-t5-xl", local_cache=True, cache_dir=cache_dir)


def test_without_network_the_error_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"google/flan-t5-xl.*without network, save it"):
        T5Embedder("cpu", "flan-t5-xl", cache_dir=tmp_path)


def test_offloading_asks_for_accelerate(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install accelerate"):
        embedder(cache_dir, use_offload_folder=tmp_path)


def test_offloaded_features_are_the_same(cache_dir, tmp_path):
    pytest.importorskip("accelerate")
    want, _ = embedder(cache_dir).get_text_embeddings(["a red cat"])
    # 12 kB hold only part of the encoder, so that the rest must go to the folder
    t5 = embedder(cache_dir, use_offload_folder=tmp_path, t5_model_kwargs={"max_memory": {"cpu": 12_000}})
    assert "disk" in t5.model.hf_device_map.values()
    got, _ = t5.get_text_embeddings(["a red cat"])
    torch.testing.assert_close(got, want)
