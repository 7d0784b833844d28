"""Left padding and the attention mask of captions."""

from __future__ import annotations

import pytest
import torch

from autoregressive.models.text_condition import left_pad_text, text_attention_mask
from tests import golden


@golden.cases("gpt.left_pad")
def test_left_padding_matches_the_golden(case):
    features, mask = left_pad_text(case.tensors["caption_embs"], case.tensors["emb_masks"])
    case.check({"c_indices": features, "c_emb_masks": mask})


def test_padding_is_exactly_zero_even_where_the_features_are_not_numbers():
    features = torch.full((1, 3, 2), torch.nan)
    features[0, 0] = torch.tensor([1.0, 2.0])
    left, mask = left_pad_text(features, torch.tensor([[True, False, False]]))
    assert left.tolist() == [[[0, 0], [0, 0], [1, 2]]]
    assert mask.tolist() == [[False, False, True]]


def test_a_mask_that_is_not_right_padded_is_refused():
    with pytest.raises(ValueError, match="right-padded"):
        left_pad_text(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match="expected"):
        left_pad_text(torch.zeros(1, 3, 2), torch.ones(1, 4))


def test_seven_words_at_the_end_of_120_positions():
    key_mask = torch.arange(120)[None] >= 113
    mask = text_attention_mask(key_mask)
    assert mask.shape == (1, 1, 120, 120)
    sees = mask[0, 0].sum(-1)
    assert (sees[113], sees[119], sees[5]) == (1, 7, 1)
    assert mask[0, 0, 5, 5]  # a padded position sees itself


def test_later_queries_are_the_last_rows_of_the_whole_mask():
    key_mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(text_attention_mask(key_mask, first_query=3), text_attention_mask(key_mask)[:, :, 3:])
