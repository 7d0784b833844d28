"""Editing: what is drawn, what is kept, and what the drawn cells can and cannot see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.models.generate import generate
from autoregressive.sample.editing import (
    edit_codes,
    edit_images,
    fit_of_kept_cells,
    last_drawn,
    paste_outside,
    with_rest,
)
from autoregressive.sample.pipeline import image_generators
from tests.autoregressive.models.tiny import random_model
from tokenizer.coding import encode_images
from tokenizer.tokenizer_image.vq_model import VQ_models

GPT = random_model(block_size=16)
LABELS, SEEDS = torch.tensor([1, 4, 1]), [3, 4, 5]
CODES = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
OPTIONS = {"cfg_scale": 2.0, "top_k": 40}


def edit(mask, codes=CODES, **more):
    return edit_codes(GPT, codes, mask, LABELS, SEEDS, **{**OPTIONS, **more})


masks = st.lists(st.booleans(), min_size=16, max_size=16).map(torch.tensor)


@settings(max_examples=30, deadline=None)
@given(mask=masks, scale=st.sampled_from([1.0, 3.0]), candidates=st.integers(1, 2))
def test_cells_outside_the_mask_are_unchanged_and_the_result_is_repeatable(mask, scale, candidates):
    edited = edit(mask, cfg_scale=scale, candidates=candidates)
    assert edited.dtype == torch.int32 and torch.equal(edited[:, ~mask], CODES[:, ~mask])
    assert torch.equal(edited, edit(mask, cfg_scale=scale, candidates=candidates))


def test_an_empty_mask_is_the_identity_and_asks_the_model_nothing(monkeypatch):
    monkeypatch.setattr(GPT, "forward", None)
    assert torch.equal(edit(torch.zeros(16, dtype=torch.bool)), CODES)


def test_a_full_mask_is_generation():
    expected = generate(GPT, LABELS, 16, generators=image_generators(SEEDS, CODES.device), **OPTIONS)
    assert torch.equal(edit(torch.ones(16, dtype=torch.bool)), expected)


@settings(max_examples=20, deadline=None)
@given(mask=masks, cell=st.integers(0, 15))
def test_drawn_cells_see_what_is_before_them_and_nothing_after(mask, cell):
    changed = CODES.clone()
    changed[:, cell] = (changed[:, cell] + 1) % 50
    before, after = edit(mask), edit(mask, codes=changed)
    assert torch.equal(before[:, :cell], after[:, :cell])
    if mask[cell]:  # what is drawn anew does not matter
        assert torch.equal(before, after)


def test_a_cell_draws_with_its_own_randomness_whatever_else_is_masked():
    whole = edit(torch.ones(16, dtype=torch.bool))
    for first in (1, 7, 15):
        tail = torch.arange(16) >= first
        assert torch.equal(edit(tail, codes=whole), whole)


def test_each_image_may_have_a_mask_of_its_own_and_does_not_depend_on_the_others():
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[0, 2:5], mask[1, 9:] = True, True
    edited = edit(mask)
    assert torch.equal(edited[2], CODES[2])
    for i in range(2):
        alone = edit_codes(GPT, CODES[i : i + 1], mask[i], LABELS[i : i + 1], SEEDS[i : i + 1], **OPTIONS)
        assert torch.equal(edited[i : i + 1], alone)


def test_with_rest_draws_everything_after_the_first_cell():
    mask = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert with_rest(mask).tolist() == [[False, False, True, True, True, True], [False] * 6]
    assert last_drawn(mask) == 4 and last_drawn(mask[1]) == -1


def test_the_candidate_that_the_kept_cells_fit_best_is_taken():
    mask = torch.arange(16) < 4
    one = edit(mask)
    best = edit(mask, candidates=8)
    fits = [fit_of_kept_cells(GPT, codes, mask.expand(3, -1), LABELS) for codes in (one, best)]
    assert (fits[1] >= fits[0]).all() and (fits[1] > fits[0]).any()
    # by hand: the log-probability of the last 12 cells after the first 4
    logits, _ = GPT(best[:, :-1].long(), LABELS)
    log_p = logits.log_softmax(-1).gather(2, best.long()[..., None])[:, 4:, 0].sum(1)
    torch.testing.assert_close(fits[1], log_p)
    assert GPT.training is False


def test_arguments_that_do_not_fit_are_refused():
    full = torch.ones(16, dtype=torch.bool)
    for call, message in [
        (lambda: edit(full[:9]), r"bool mask \(16,\)"),
        (lambda: edit(full.long()), "int64"),
        (lambda: edit(full[:9], codes=CODES[:, :9]), r"codes \(batch, 16\)"),
        (lambda: edit(full, codes=CODES + 40), "codes are 0 to 49"),
        (lambda: edit(full, candidates=0), "at least one candidate"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQ_models["VQ-4-S"](codebook_size=50).eval()


def test_images_are_edited_through_their_codes(tokenizer):
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    codes = encode_images(tokenizer, images)
    assert codes.shape == (3, 16) and torch.equal(codes[1:2], encode_images(tokenizer, images[1:2]))
    mask = torch.arange(16) % 4 == 0  # the left column
    edited = edit_images(GPT, tokenizer, images, mask, LABELS, SEEDS, **OPTIONS)
    assert edited.shape == images.shape
    pasted = edit_images(GPT, tokenizer, images, mask, LABELS, SEEDS, paste=True, **OPTIONS)
    assert torch.equal(pasted[..., 4:], images[..., 4:]) and torch.equal(pasted[..., :4], edited[..., :4])


def test_paste_takes_a_mask_for_each_image():
    edited, original = torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    mask = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    pasted = paste_outside(edited, original, mask)
    assert pasted[0, :, :4, :4].eq(1).all() and pasted[1, :, 4:, 4:].eq(1).all() and pasted.sum() == 2 * 3 * 16
