"""The sampling benchmark on a small model: its reference is right, its numbers fit together."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from autoregressive.models.generate import generate
from benchmarks import sampling
from benchmarks.plain_decoder import plain_generate
from tests.autoregressive.models.tiny import random_model


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_the_plain_decoder_draws_the_same_tokens(cfg_scale, n_kv_head):
    model, labels = random_model(n_kv_head=n_kv_head), torch.tensor([1, 4, 0])
    expected = generate(model, labels, 9, cfg_scale=cfg_scale, sample_logits=False)
    assert torch.equal(plain_generate(model, labels, 9, cfg_scale, 20, greedy=True).int(), expected)
    torch.manual_seed(0)
    legacy = generate(model, labels, 9, cfg_scale=cfg_scale, top_k=20)
    torch.manual_seed(0)
    assert torch.equal(plain_generate(model, labels, 9, cfg_scale, 20).int(), legacy)


def test_the_last_line_is_one_json_object(monkeypatch, capsys):
    flags = ["--gpt-model", "GPT-XS", "--image-size", "64", "--batch-size", "1", "2", "--repeats", "1",
             "--plain-steps", "3", "--engine", "eager", "--quantize", "none", "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sampling.py", *flags])
    monkeypatch.setattr(sampling, "vq_seconds", lambda *_: 0.5)
    sampling.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, two = result["batches"]
    assert (one["batch"], two["batch"]) == (1, 2)
    assert result["speedup"] == two["eager"]["ratio"]
    eager = two["eager"]
    assert eager["ratio"] == pytest.approx(two["plain"]["step_ms"] / eager["step_ms"], rel=0.02)
    assert eager["share_of_floor"] == pytest.approx(eager["floor_ms"] / eager["step_ms"], abs=0.02)
    weights = 2 * (4 * (4 * 128 * 128 + 3 * 128 * 384) + 128 * 16384)
    assert eager["step_bytes"] == weights + 2 * 4 * (1 + 8) * 4 * 128 * 2  # rows: two images, twice for guidance


def test_more_rows_cost_more_cache_but_the_same_weights():
    model = random_model()
    one, two = (sampling.step_cost(model, rows, 4) for rows in (1, 2))
    assert two["flops"] == 2 * one["flops"]
    assert two["bytes"] - one["bytes"] == 2 * 5 * 2 * 32 * 4
