"""Classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoregressive.models.guidance import (
    guidance_scales,
    guided_at,
    guided_logits,
    null_rows_needed,
    uses_guidance,
    with_null_condition,
)
from autoregressive.models.schedules import SCHEDULES
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


def test_scale_one_is_exactly_the_conditional_half():
    logits = torch.randn(4, 7) * 1e4
    assert torch.equal(guided_logits(logits, 1.0), logits[:2])


def test_scales_of_each_token():
    assert guidance_scales(4, 3.0) == [3.0] * 4
    assert guidance_scales(4, 1.0, schedule="linear") == guidance_scales(4, 0.5) == [1.0] * 4
    assert guidance_scales(6, 3.0, cfg_interval=1) == [3.0, 3.0, 3.0, 1.0, 1.0, 1.0]  # the first, and two steps
    assert guidance_scales(6, 3.0, cfg_interval=2, start=2) == [1.0, 1.0, 3.0, 3.0, 1.0, 1.0]
    assert guidance_scales(5, 3.0, schedule="linear") == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert guidance_scales(5, 3.0, cfg_interval=2, schedule="linear", start=2) == [1.0, 1.0, 2.0, 2.5, 1.0]
    with pytest.raises(ValueError, match="first guided token"):
        guidance_scales(5, 3.0, start=-1)


@given(
    count=st.integers(1, 30), scale=st.floats(0, 9), interval=st.integers(-1, 30), start=st.integers(0, 30),
    schedule=st.sampled_from(SCHEDULES), power=st.floats(0.2, 5),
)  # fmt: skip
def test_no_null_row_is_computed_after_the_last_guided_token(count, scale, interval, start, schedule, power):
    scales = guidance_scales(count, scale, interval, schedule, power, start)
    needed = null_rows_needed(scales)
    assert all(s == 1.0 for s in scales[needed:]) and (needed == 0 or scales[needed - 1] > 1.0)
    assert max(scales) <= max(scale, 1.0)
