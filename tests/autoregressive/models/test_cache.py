"""Caches in 8 bits: the rule that rounds, and a model that reads what it has stored."""

from __future__ import annotations

import pytest
import torch

from autoregressive.models.cache import (
    EIGHT_BITS,
    LARGEST,
    DecodeCache,
    QuantizedKVCache,
    dequantize_vectors,
    quantize_vectors,
)
from tests.autoregressive.models.tiny import random_model
from utils.flops import cache_bytes

# of a vector's largest number: half a step of int8; in fp8 half a step of the largest numbers, 16 of 448
_ERROR = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 16 / 448}
FORMATS = pytest.mark.parametrize("dtype", EIGHT_BITS.values(), ids=EIGHT_BITS)


@FORMATS
def test_vectors_come_back_within_half_a_step_of_the_format(dtype):
    sizes = torch.tensor([1e-4, 1.0, 300.0])[:, None, None]
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * sizes
    values, scale = quantize_vectors(x, dtype)
    largest = x.abs().amax(-1)
    assert (values.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (3, 5))
    assert (values.float().abs().amax(-1) == LARGEST[dtype]).all()
    back = dequantize_vectors(values, scale, torch.float32)
    error = (back - x).abs().amax(-1)
    assert (error <= largest * _ERROR[dtype] * 1.0001).all() and (error > largest * _ERROR[dtype] / 4).all()
    assert torch.equal(dequantize_vectors(values, scale, torch.bfloat16), back.bfloat16())


@FORMATS
def test_a_vector_of_zeros_stays_one(dtype):
    values, scale = quantize_vectors(torch.zeros(2, 8), dtype)
    assert not values.float().any() and (scale > 0).all()


def test_by_hand():
    values, scale = quantize_vectors(torch.tensor([[-254.0, 1.0, 3.0, 100.0]]), torch.int8)
    assert values.tolist() == [[-127, 0, 2, 50]] and scale.tolist() == [2.0]
    values, scale = quantize_vectors(torch.tensor([[896.0, 34.0, -38.0, 0.25]]), torch.float8_e4m3fn)
    assert values.tolist() == [[448, 16, -20, 0.125]] and scale.tolist() == [2.0]


@FORMATS
def test_the_condition_is_returned_as_it_is_and_later_positions_as_stored(dtype):
    cache = QuantizedKVCache(3, 6, 2, 12, dtype)
    k, v = torch.randn(2, 2, 2, 4, 12, generator=torch.Generator().manual_seed(1)).unbind()
    cache.length = 3
    returned = cache.update(torch.arange(3), k[:, :, :3], v[:, :, :3])
    assert torch.equal(returned[0], k[:, :, :3]) and torch.equal(returned[1], v[:, :, :3])
    cache.length = 4
    returned = cache.update(torch.tensor([3]), k[:, :, 3:], v[:, :, 3:])
    for got, new in zip(returned, (k, v)):
        assert torch.equal(got, dequantize_vectors(*quantize_vectors(new, dtype), torch.float32))
    untouched = (cache.k_cache[2].float(), cache.k_cache[:, :, 4:].float(), cache.v_scale[2], cache.v_scale[:, :, 4:])
    assert not any(part.any() for part in untouched)
    half = cache.update(torch.tensor([3]), k[:, :, 3:].bfloat16(), v[:, :, 3:].bfloat16())
    assert {part.dtype for part in half} == {torch.bfloat16}


@FORMATS
def test_part_of_a_cache_shares_its_memory(dtype):
    cache = QuantizedKVCache(3, 6, 2, 12, dtype)
    part = cache.first(2, 5)
    part.update(torch.tensor([4]), torch.ones(2, 2, 1, 12), torch.ones(2, 2, 1, 12))
    assert part.k_scale.shape == (2, 2, 5) and set(cache.scales) == {"k_scale", "v_scale"}
    assert (cache.k_cache[:2, :, 4].float() == LARGEST[dtype]).all() and (cache.v_scale[:2, :, 4] > 0).all()
    assert cache.k_cache.float().count_nonzero() == 2 * 2 * 12


def test_bytes_are_those_of_the_estimate():
    config = random_model(dim=64).config  # heads of 16 numbers, which need no padding
    for dtype, value, scale in ((torch.bfloat16, 2, 0), (torch.int8, 1, 4), (torch.float8_e4m3fn, 1, 4)):
        cache = DecodeCache.allocate(config, 3, 10, dtype, torch.device("cpu"))
        held = sum(buffer.nbytes for layer in cache.layers for buffer in layer.buffers())
        assert held == cache_bytes(config, 3, 10, value, scale)
    padded = QuantizedKVCache(1, 1, 1, 100, torch.int8)
    assert padded.k_cache.untyped_storage().nbytes() == 112 and padded.k_cache.shape[-1] == 100


@FORMATS
def test_logits_of_such_caches_are_close_and_not_the_same(dtype):
    model, cpu = random_model(n_kv_head=2), torch.device("cpu")
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = {}
    with torch.no_grad():
        for name in (torch.float32, dtype):
            cache = DecodeCache.allocate(model.config, 2, 9, name, cpu)
            model(None, torch.tensor([1, 2]), torch.arange(1), cache=cache)
            for i in range(8):
                logits[name], _ = model(tokens[:, i, None], None, torch.tensor([i + 1]), cache=cache)
    error = (logits[dtype] - logits[torch.float32]).std() / logits[torch.float32].std()
    assert 1e-4 < error < 0.1
