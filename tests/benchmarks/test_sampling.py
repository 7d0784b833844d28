"""The sampling benchmark on a small model: its reference is right, its numbers fit together."""

from __future__ import annotations

import json
import sys
import weakref
from typing import ClassVar

import pytest
import torch

from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from benchmarks import sampling
from benchmarks.plain_decoder import plain_generate
from tests.autoregressive.models.tiny import random_model
from tokenizer.tokenizer_image.vq_model import VQ_4_S


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


class Preparing(Engine):
    """Says that its first generation takes 3 seconds to prepare, and when there are two of its kind."""

    alive: ClassVar[list[weakref.ref]] = []
    generations: ClassVar[list[int]] = []  # of each engine

    def __init__(self, model):
        super().__init__(model)
        assert all(engine() is None for engine in self.alive)
        self.alive.append(weakref.ref(self))
        self.generations.append(0)
        self.ready_seconds = 0.0

    def new_cache(self, *args):
        self.ready_seconds = 3.0
        self.generations[-1] += 1
        return super().new_cache(*args)


def test_engines_are_warm_and_have_the_memory_for_themselves(monkeypatch, capsys):
    args = sampling.parser().parse_args(["--engine", "eager", "native", "--quantize", "none", "--batch-size", "1", "2"])
    args.plain_steps, args.repeats = 2, 2
    monkeypatch.setattr(sampling, "make_engine", lambda model, name, quantize: Preparing(model))
    monkeypatch.setattr(Preparing, "name", property(lambda engine: f"number {len(engine.alive)}"))
    times, ready = sampling.measure_all(random_model(), args, torch.device("cpu"))
    names = ["number 1", "number 2"]
    assert list(times) == [1, 2] and all(list(found) == ["plain", *names] for found in times.values())
    assert list(ready) == names and Preparing.generations == [2 * (1 + 2)] * 2
    printed = capsys.readouterr().out
    assert all(f"{name}: ready after 0.0 s; compiling and capturing took 3.0 s in all" in printed for name in names)


def test_the_tokenizer_is_measured_warm(monkeypatch):
    decoded, clock = [], iter([10.0, 12.0])
    monkeypatch.setattr(sampling, "VQ_16", VQ_4_S)
    monkeypatch.setattr(sampling, "decode_codes", lambda tokenizer, codes: decoded.append(codes.shape))
    monkeypatch.setattr(sampling, "wait", lambda device: next(clock))
    assert sampling.vq_seconds(random_model(), 4, torch.device("cpu")) == 0.5
    assert decoded == [(4, 9)] * 2


def test_a_random_gpt_is_made_where_it_is_used(monkeypatch):
    args, made_on = sampling.parser().parse_args(["--gpt-model", "GPT-XS", "--image-size", "64"]), []
    make = sampling.GPT_models["GPT-XS"]

    def spy(**fields):
        made_on.append(torch.get_default_device())
        return make(**fields)

    monkeypatch.setitem(sampling.GPT_models, "GPT-XS", spy)
    model = sampling.random_gpt(args, torch.device("meta"))
    assert made_on == [torch.device("meta")] and model.block_size == 16
    assert {(weight.device.type, weight.dtype) for weight in model.parameters()} == {("meta", torch.bfloat16)}


def test_more_rows_cost_more_cache_but_the_same_weights():
    model = random_model()
    one, two = (sampling.step_cost(model, rows, 4) for rows in (1, 2))
    assert two["flops"] == 2 * one["flops"]
    assert two["bytes"] - one["bytes"] == 2 * 5 * 2 * 32 * 4
