"""Classifier-free guidance."""

from __future__ import annotations

import torch

from autoregressive.models.guidance import guided_at, guided_logits, uses_guidance, with_null_condition
from tests.autoregressive.models.tiny import random_model


def test_guidance_is_on_above_one():
    assert [uses_guidance(scale) for scale in (0.0, 1.0, 1.01, 7.5)] == [False, False, True, True]


def test_interval_counts_decode_steps():
    assert [sum(guided_at(step, k) for step in range(10)) for k in (-1, 0, 4, 4.5, -0.5)] == [10, 1, 5, 5, 0]


def test_guided_logits_go_beyond_the_conditional_ones():
    logits = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert guided_logits(logits, 3.0).tolist() == [[3.0, 0.0]]
    assert guided_logits(logits, 1.0).tolist() == [[1.0, 2.0]]


def test_the_null_class_follows_the_classes():
    assert with_null_condition(random_model(), torch.tensor([0, 3])).tolist() == [0, 3, 5, 5]


def test_the_null_caption_is_aligned_to_the_right_end():
    model = random_model(model_type="t2i", cls_token_num=4)
    caption = torch.randn(2, 4, 6)
    both = with_null_condition(model, caption)
    assert torch.equal(both[:2], caption)
    assert torch.equal(both[2], model.cls_embedding.uncond_embedding[116:])
    assert torch.equal(both[3], both[2])
