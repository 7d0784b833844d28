"""The engine of Triton kernels gives the tokens of the plain one; interpreted here, compiled where a GPU is.

The functions `check_...` take the device to compute on.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autoregressive.engine.weight_only import int8_copy
from autoregressive.models.cache import QuantizedKVCache
from autoregressive.models.generate import generate
from autoregressive.models.noise import ImageNoise
from benchmarks.quantization import RoundedCaches
from tests.autoregressive.engine.kernels.interpreted import run_interpreted
from tests.autoregressive.models.tiny import captions, random_model

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton, which comes with PyTorch for NVIDIA GPUs, is not installed", allow_module_level=True)


def engine_of(model, quantize="none", kv_cache_dtype="auto"):
    """Imports Triton, which reads at its own import whether it is to interpret."""
    from autoregressive.engine.build import make_engine

    engine = make_engine(model, "triton", quantize, kv_cache_dtype)
    assert engine.name == "triton"
    return engine


def same_tokens(engine, model, cond, count, masks=None, seeds=None, **options):
    """Whether both engines generate the same."""
    seeds = range(len(cond)) if seeds is None else seeds
    tokens, expected = (
        generate(m, cond, count, masks, generators=ImageNoise(seeds, cond.device), **options) for m in (engine, model)
    )
    return torch.equal(tokens, expected)


def check_classes_with_every_option(device: str = "cpu") -> None:
    """Guidance with an interval, filters, forced tokens, schedules, greedy; batches one after another."""
    model = random_model(n_kv_head=2, block_size=9).to(device)
    engine = engine_of(model)
    for labels, options in (
        ([1, 2, 3], {"cfg_scale": 2.0, "top_k": 20}),
        ([4], {"cfg_scale": 3.0, "cfg_interval": 3, "top_p": 0.8}),
        ([1, 0], {"min_p": 0.02, "temperature_end": 0.5}),
        ([2, 1, 3], {"cfg_scale": 4.0, "cfg_schedule": "linear", "cfg_start": 2, "sample_logits": False}),
    ):
        cond = torch.tensor(labels, device=device)
        forced = torch.randint(-1, 50, (len(labels), 9), device=device)
        for given in (None, forced):
            assert same_tokens(engine, model, cond, 9, given=given, **options), (labels, options)


def check_captions_of_different_lengths(device: str = "cpu") -> None:
    """Left-padded captions, with guidance and in batches that are filled up."""
    model = random_model(3, model_type="t2i", cls_token_num=5, block_size=9).to(device)
    engine = engine_of(model)
    for lengths in ([5, 2, 1], [3, 4]):
        features, mask = captions(len(lengths), lengths, 5)
        cond, mask = features.to(device), mask.to(device)
        assert same_tokens(engine, model, cond, 9, mask, cfg_scale=3.0, top_k=30)
        assert same_tokens(engine, model, cond, 6, mask)
    holes = mask.clone()
    holes[0, -1] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        generate(engine, cond, 4, holes, generators=ImageNoise(range(len(cond)), device))


def check_more_rows_than_skinny_products_take(device: str = "cpu") -> None:
    """Above 64 rows PyTorch multiplies the matrices."""
    model = random_model().to(device)
    cond = torch.arange(40, device=device) % 5
    assert same_tokens(engine_of(model), model, cond, 4, cfg_scale=2.0, top_k=20)


def check_int8_and_odd_heads(device: str = "cpu") -> None:
    """Heads of 20 numbers, which the cache pads; with int8 weights the tokens of the model that holds them so."""
    model = random_model(dim=40, n_head=2, multiple_of=8).to(device)
    cond = torch.tensor([1, 2], device=device)
    assert same_tokens(engine_of(model), model, cond, 9, cfg_scale=2.0)
    assert same_tokens(engine_of(model, "int8"), int8_copy(model), cond, 9, cfg_scale=2.0)


def check_caches_in_eight_bits(device: str = "cpu") -> None:
    """Tokens of the plain model on such caches, in batches that are filled up and then are not; also drawn one by one
    with a generator of PyTorch."""
    classes = random_model(n_kv_head=2, block_size=9).to(device)
    labels = torch.tensor([1, 2, 3], device=device)
    texts = random_model(1, model_type="t2i", cls_token_num=5, block_size=9).to(device)
    features, mask = captions(3, [5, 2, 1], 5)
    for name in ("int8", "fp8"):
        engine, plain = engine_of(classes, kv_cache_dtype=name), RoundedCaches(classes, name)
        for cond in (labels, labels[:1]):
            assert same_tokens(engine, plain, cond, 5, cfg_scale=3.0, cfg_interval=3, top_k=20)
        assert all(isinstance(layer, QuantizedKVCache) for layer in engine._cache.layers)
        drawn = [
            generate(m, labels, 9, cfg_scale=2.0, generators=[torch.Generator(device).manual_seed(i) for i in range(3)])
            for m in (engine, plain)
        ]
        assert torch.equal(*drawn)
        engine, plain = engine_of(texts, kv_cache_dtype=name), RoundedCaches(texts, name)
        assert same_tokens(engine, plain, features.to(device), 4, mask.to(device), cfg_scale=3.0, top_k=30)


def test_classes_with_every_option():
    run_interpreted(__name__, "check_classes_with_every_option")


def test_captions_of_different_lengths():
    run_interpreted(__name__, "check_captions_of_different_lengths")


def test_more_rows_than_skinny_products_take():
    run_interpreted(__name__, "check_more_rows_than_skinny_products_take")


def test_int8_and_odd_heads():
    run_interpreted(__name__, "check_int8_and_odd_heads")


def test_caches_in_eight_bits():
    run_interpreted(__name__, "check_caches_in_eight_bits")


def test_without_a_gpu_the_engine_says_why():
    with pytest.raises(ValueError, match="run on a GPU, the model is on cpu"):
        engine_of(random_model())


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    from autoregressive.engine.fused import unsupported

    with FakeTensorMode(), torch.device("cuda"):
        model = random_model()
    for capability, has_fp8 in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert unsupported(model, "int8") is None
        reason = unsupported(model, "fp8")
        assert reason is None if has_fp8 else "8.9 (Ada) and later" in reason
