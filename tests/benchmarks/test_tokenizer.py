"""The tokenizer benchmark on a tiny model: its reference computes the same, its last line is one JSON object."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch

from benchmarks import tokenizer as benchmark
from tests.tokenizer.builders import keys_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    return benchmark.both_models(CPU, "VQ-8-S")


def test_the_reference_is_the_same_model(pair):
    plain, ours = pair
    assert keys_of(plain) == keys_of(ours)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    benchmark.require_equal(plain, ours, images)
    for one, two in zip(plain.quantize.train()(images[:, :1].expand(-1, 8, -1, -1))[1],
                        ours.quantize.train()(images[:, :1].expand(-1, 8, -1, -1))[1]):  # fmt: skip
        assert float(torch.as_tensor(one).detach()) == pytest.approx(float(torch.as_tensor(two).detach()), abs=1e-5)


def test_another_model_is_noticed(pair):
    plain, ours = pair
    state = {key: value.clone() for key, value in ours.state_dict().items()}
    images = torch.rand(1, 3, 32, 32)
    for key in ("quantize.embedding.weight", "decoder.conv_out.bias"):
        ours.load_state_dict({**state, key: state[key].flip(0) + 0.1})
        with pytest.raises(RuntimeError, match=r"differ by|agree"):
            benchmark.require_equal(plain, ours, images)
    ours.load_state_dict(state)


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield
    torch.set_float32_matmul_precision(before)


def test_models_are_compared_without_tf32(pair, tf32):
    plain, ours = pair
    seen, cudnn, matmul = [], torch.backends.cudnn, torch.backends.cuda.matmul
    watched = (plain.encoder, ours.encoder, ours.decoder)
    watches = [m.register_forward_hook(lambda *_: seen.append((cudnn.allow_tf32, matmul.allow_tf32))) for m in watched]
    assert cudnn.allow_tf32 and matmul.allow_tf32
    benchmark.require_equal(plain, ours, torch.rand(1, 3, 32, 32))
    for watch in watches:
        watch.remove()
    assert seen == [(False, False)] * 3


def test_a_decoder_in_bf16_gives_the_same_images(pair):
    plain, ours = pair
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    works = benchmark.picture_works(plain, ours, images)["decode"]
    expected, found = (works[name]() for name in ("plain", "ours, bf16"))
    assert works.keys() == {"plain", "ours", "ours, bf16"} and found.shape == expected.shape
    assert 0 < (found - expected).abs().mean() < 0.02 * expected.std()


def test_both_train_in_the_same_way():
    plain, ours = benchmark.both_models(CPU, "VQ-8-S")
    works = benchmark.training_works(plain, ours, torch.rand(2, 3, 64, 64) * 2 - 1, "none")
    before = ours.state_dict()["decoder.conv_out.weight"].clone()
    for work in works.values():
        work()
    moved = ours.state_dict()
    assert (moved["decoder.conv_out.weight"] - before).abs().max() > 5e-5
    for key, value in plain.state_dict().items():
        # Adam's first step is the sign of the gradient: where that is next to nothing, rounding decides
        assert (value - moved[key]).abs().mean() < 2e-5, key


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="/proc does not tell it here")
def test_peak_memory_is_what_a_work_needs_at_most():
    def work() -> None:
        for _ in range(3):
            torch.ones(20_000_000).sum()  # 80 MB, freed each time

    found = benchmark.peak_megabytes(work, CPU)
    assert 70 < found < 200  # three of them would be 240


def test_the_last_line_is_one_json_object(monkeypatch, capsys):
    flags = ["--quick", "--vq-model", "VQ-8-S", "--image-size", "32", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", *flags])
    monkeypatch.setattr(benchmark, "TOKENS", 512)
    benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ratios = result["ratios"]
    assert ratios.keys() == {"quantizer", "quantizer with gradients", "encode", "decode", "training step"}
    assert result["speedup"] == pytest.approx(math.prod(ratios.values()) ** 0.2, rel=0.02)
    decode = result["seconds"]["decode"]
    assert result["images_per_second"]["decode"]["ours"] == pytest.approx(1 / decode["ours"], rel=0.05)
    assert ratios["decode"] == pytest.approx(decode["plain"] / decode["ours"], rel=0.05)
    assert result["training_peak_mb"].keys() == {"plain", "ours"}
