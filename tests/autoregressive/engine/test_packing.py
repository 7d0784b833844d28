"""The order of packed weights, keys and values: every number is found where the C++ step looks for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoregressive.engine.packing import PER_WORD, interleave, pack_keys, pack_matrix, pack_values, quantize_rows


def lookup(packed: Tensor, output: int, i: int) -> float:
    """Weight of `output` and input `i` in (blocks, words, 16, values of a word)."""
    per = packed.shape[-1]
    return packed[output // 16, i // per, output % 16, i % per].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_found_again_padded_with_zeros(dtype):
    weight = torch.randn(40, 9).to(dtype)
    packed = pack_matrix(weight, dtype)
    assert packed.data.shape == (4, -(-9 // PER_WORD[dtype]), 16, PER_WORD[dtype])
    for output, i in [(0, 0), (15, 8), (16, 1), (39, 7)]:
        assert lookup(packed.data, output, i) == weight[output, i].item()
    assert packed.data.float().abs().sum().item() == pytest.approx(weight.float().abs().sum().item(), rel=1e-4)
    assert packed.scale is None and packed.nbytes == packed.data.numel() * dtype.itemsize


def test_int8_rounds_to_the_nearest_of_255_levels_per_output():
    weight = torch.randn(33, 10) * torch.logspace(-3, 3, 33)[:, None]
    rounded, scale = quantize_rows(weight)
    error = (rounded * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] * 0.5001).all() and (rounded.abs().amax(1) == 127).all()
    packed = pack_matrix(weight, torch.int8)
    assert packed.data.shape == (4, 3, 16, 4)
    assert lookup(packed.data, 20, 9) == rounded[20, 9]
    torch.testing.assert_close(packed.offset[:33], rounded.sum(1).float() * 128)
    assert (packed.scale[33:] == 0).all() and (packed.offset[33:] == 0).all()


def test_an_output_of_zeros_stays_zero():
    rounded, scale = quantize_rows(torch.zeros(2, 4))
    assert (rounded == 0).all() and scale.isfinite().all()


def test_interleaved_blocks_take_turns():
    first, second = torch.randn(32, 8), torch.randn(32, 8)
    both = interleave(pack_matrix(first, torch.int8), pack_matrix(second, torch.int8))
    one, two = pack_matrix(first, torch.int8), pack_matrix(second, torch.int8)
    assert torch.equal(both.data[0::2], one.data) and torch.equal(both.data[1::2], two.data)
    assert torch.equal(both.scale[1], two.scale[:16]) and torch.equal(both.offset[2], one.offset[16:])


def test_keys_have_a_scale_for_each_position():
    keys = torch.randn(2, 3, 5, 8) * torch.logspace(-3, 3, 5)[:, None]
    rounded, scale = quantize_rows(keys)
    assert scale.shape == (2, 3, 5) and (rounded.abs().amax(-1) == 127).all()
    assert ((rounded * scale[..., None] - keys).abs() <= scale[..., None] * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_keys_and_values_are_found_again(dtype):
    keys, values = ((torch.randn(2, 3, 21, 20) * 40).to(dtype) for _ in range(2))
    per = PER_WORD[dtype]
    packed = pack_keys(keys).view(2, 3, 2, 20 // per, 16, 1).view(dtype)
    for position, channel in [(0, 0), (17, 19), (15, 6)]:
        found = packed[..., position // 16, channel // per, position % 16, channel % per]
        assert torch.equal(found, keys[..., position, channel])
    packed = pack_values(values).view(2, 3, -(-21 // per), 2, 16, 1).view(dtype)
    for position, channel in [(0, 0), (20, 19), (15, 16)]:
        found = packed[..., position // per, channel // 16, channel % 16, position % per]
        assert torch.equal(found, values[..., position, channel])
