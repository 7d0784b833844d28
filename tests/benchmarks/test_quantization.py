"""Feeding codes through an engine gives the likelihood of the full forward; int8 is close and not the same."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.engine import Engine
from autoregressive.train.inputs import ClassInputs, TextInputs
from benchmarks import quantization
from tests.autoregressive.engine.test_native import needs_compiler, wide_model
from tests.autoregressive.models.tiny import captions


def test_fed_logits_are_those_of_the_full_forward():
    model, codes, labels = wide_model(), torch.randint(300, (3, 36)), torch.tensor([1, 0, 4])
    fed = torch.stack(list(quantization.fed_logits(Engine(model), labels, codes)), dim=1)
    with torch.no_grad():
        full, _ = model(codes[:, :-1], labels)
    torch.testing.assert_close(fed, full, atol=1e-4, rtol=1e-4)


def test_fed_logits_of_captions_are_those_of_the_full_forward_without_unreadable_samples():
    model, codes = wide_model(model_type="t2i", cls_token_num=5), torch.randint(300, (4, 1, 36))
    features, text = captions(4, [2, 5, 1, 3], 5)
    batch = codes, features[:, None], text.bool(), torch.tensor([1, 1, 0, 1])
    args = argparse.Namespace(dataset="t2i_code", t5_feat_path="features", code_path="codes")
    inputs = TextInputs(args, torch.device("cpu"))
    fed = torch.stack(list(quantization.fed_logits(Engine(model), *quantization.condition_and_codes(inputs, batch))), 1)
    arguments = {name: value[[0, 1, 3]] for name, value in inputs(batch).items() if name not in ("targets", "valid")}
    with torch.no_grad():
        full, _ = model(**arguments)
    torch.testing.assert_close(fed, full, atol=1e-4, rtol=1e-4)


@needs_compiler
def test_each_format_is_measured_against_the_reference(monkeypatch):
    codes, labels = torch.randint(300, (4, 1, 36)), torch.tensor([[1], [0], [4], [2]])
    monkeypatch.setattr(
        quantization, "load_gpt", lambda args, vocab, device, dtype=torch.float32: wide_model().to(dtype)
    )
    data = torch.utils.data.TensorDataset(codes, labels)
    monkeypatch.setattr(ClassInputs, "codes", lambda self, path: data)
    args = argparse.Namespace(
        precision=["none", "bf16"], quantize=["none", "int8"], vocab_size=300, code_path="", images=None, batch_size=3,
        kv_cache_dtype=["int8", "fp8"], gpt_type="c2i",
    )  # fmt: skip
    found = quantization.measure(args, torch.device("cpu"))
    with torch.no_grad():
        logits, _ = wide_model()(codes[:, 0, :-1], labels[:, 0])
    bits = F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item() / 0.693147
    assert found["reference"] == {"bits_per_token": pytest.approx(bits, abs=1e-3), "greedy_agreement": 1.0}
    assert found["native none none"] == pytest.approx(found["reference"], abs=1e-4)
    rounded = found["native none int8"]
    assert 0.85 < rounded["greedy_agreement"] < 1
    assert abs(rounded["bits_per_token"] - bits) < 0.05
    for name in ("none none", "bf16 none", "none int8", "bf16 int8"):
        cached, full = found[f"native {name}, int8 caches"], found[f"native {name}"]
        assert cached != full and abs(cached["bits_per_token"] - full["bits_per_token"]) < 0.02
    for name in ("int8", "fp8"):
        cached = found[f"reference, {name} caches"]
        assert cached != found["reference"] and abs(cached["bits_per_token"] - bits) < 0.05
