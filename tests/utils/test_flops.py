"""Costs against numbers computed by hand, torch's own counter, and the published parameter counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.models.config import ModelArgs, sized_args
from autoregressive.models.gpt import Transformer
from utils import flops

# by hand: dim 32, 2 blocks, hidden 96 (85 rounded up to 16), 64 codes, 16 tokens
TINY = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 16, "vocab_size": 64, "block_size": 16}
TINY_BLOCKS = 2 * (4 * 32 * 32 + 3 * 32 * 96)


def test_weights_by_hand():
    shape = ModelArgs(**TINY)
    assert flops.block_weights(shape) == TINY_BLOCKS == 26_624
    assert flops.head_weights(shape) == 32 * 64
    grouped = ModelArgs(**TINY, n_kv_head=1)
    assert flops.block_weights(grouped) == TINY_BLOCKS - 2 * 2 * 32 * 16


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("GPT-B", 110_888_448), ("GPT-XL", 774_699_520), ("GPT-3B", 3_096_659_200)],
)
def test_published_parameter_counts(size, parameters):
    shape = sized_args(size)
    lookups = (1001 + shape.vocab_size) * shape.dim
    norms = (2 * shape.n_layer + 1) * shape.dim
    assert flops.block_weights(shape) + flops.head_weights(shape) + lookups + norms == parameters
    with torch.device("meta"):
        assert flops.count_parameters(Transformer(shape)) == parameters


def test_shared_and_frozen_parameters():
    linear = nn.Linear(3, 5)
    module = nn.Sequential(linear, linear, nn.Linear(5, 2).requires_grad_(False))
    assert flops.count_parameters(module) == 20
    assert flops.count_parameters(module, trainable_only=False) == 32


def test_training_flops_by_hand():
    shape = ModelArgs(**TINY)
    forward = 16 * 2 * TINY_BLOCKS + 16 * 2 * 32 * 64 + 2 * 4 * 32 * 16 * 16
    assert flops.forward_flops_per_image(shape) == forward
    assert flops.training_flops_per_image(shape) == 3 * forward
    assert flops.training_flops_per_token(shape) == 3 * forward / 16


def counted_flops(args: ModelArgs, rows: int) -> tuple[int, int]:
    """FLOPs of the forward, and of forward and backward, as torch sees them on the real model."""
    model = Transformer(args)
    captions = torch.zeros(rows, args.cls_token_num, args.caption_dim)
    condition = torch.zeros(rows, dtype=torch.long) if args.model_type == "c2i" else captions
    codes = torch.zeros(rows, args.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, loss = model(codes[:, :-1], condition, targets=codes)
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def test_the_counter_of_torch_agrees():
    args = ModelArgs(**TINY)
    forward, both = counted_flops(args, rows=3)
    assert forward == 3 * flops.forward_flops_per_image(args)
    assert both == 3 * flops.training_flops_per_image(args)


def test_captions_cost_their_projection():
    args = ModelArgs(**TINY, model_type="t2i", cls_token_num=5, caption_dim=24)
    forward, _ = counted_flops(args, rows=2)
    assert forward == 2 * flops.forward_flops_per_image(args)


def test_six_flops_per_weight_and_token():
    shape = sized_args("GPT-XL")
    weights = flops.block_weights(shape) + flops.head_weights(shape)
    attention = 12 * shape.n_layer * shape.dim * 256
    assert flops.training_flops_per_token(shape) == 6 * weights + attention


def test_decoding_by_hand():
    shape = ModelArgs(**TINY)
    weights = TINY_BLOCKS + 32 * 64
    assert flops.decode_flops_per_token(shape, context=10) == 2 * weights + 4 * 2 * 32 * 10
    assert flops.cache_bytes(shape, rows=3, positions=10) == 2 * 3 * 10 * 2 * 32 * 2 == 7680
    # in 8 bits: half of it, and 4 bytes for each of the 240 keys and values of 2 heads in 2 blocks
    assert flops.cache_bytes(shape, 3, 10, bytes_per_value=1, bytes_per_scale=4) == 3840 + 4 * 240
    assert flops.decode_bytes_per_step(shape, 3, 10) == 2 * weights + 7680
    assert flops.decode_bytes_per_step(shape, 3, 10, bytes_per_value=4) == 2 * flops.decode_bytes_per_step(shape, 3, 10)
    # 15 steps that see 2, 3, ... 16 positions: 135 in all
    assert flops.decode_bytes_per_image(shape, rows=3) == (15 * 2 * weights + 135 * 768) / 3


def test_grouped_heads_shrink_the_cache():
    many, one = ModelArgs(**TINY), ModelArgs(**TINY, n_kv_head=1)
    assert flops.cache_bytes(many, 4, 16) == 2 * flops.cache_bytes(one, 4, 16)


def test_memory_floor_of_a_published_model():
    """GPT-B, 384 px, 8 images with guidance at 4.3 TB/s: 49 ms for all 575 steps."""
    shape = sized_args("GPT-B", block_size=576)
    seconds = 16 * flops.decode_bytes_per_image(shape, rows=16) / 4.3e12
    assert seconds == pytest.approx(0.049, abs=5e-4)


def test_hardware_and_mfu():
    h100 = flops.hardware_of("NVIDIA H100 80GB HBM3")
    assert h100 == flops.Hardware(989e12, 3.35e12)
    assert flops.hardware_of("NVIDIA H100 PCIe").flops_per_second == 756e12
    assert flops.hardware_of("NVIDIA A100-SXM4-80GB").bytes_per_second == 2.039e12
    assert flops.hardware_of("a toaster") is None
    assert flops.mfu(989e12, seconds=2.0, hardware=h100) == 0.5
    assert flops.mfu(989e12, seconds=1.0, hardware=h100, devices=4) == 0.25
