"""A caption in place of the unconditional embedding."""

import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.text_condition import text_attention_mask
from tests.autoregressive.models.tiny import captions, random_model

GREEDY = {"sample_logits": False}


@torch.no_grad()
def guided_by_hand(model, cond, negative, scale, count):
    """Greedy tokens from full forward passes over both captions, each under its own mask."""
    tokens = torch.zeros(len(cond[0]), 0, dtype=torch.int64)
    for _ in range(count):
        logits = []
        for features, mask in (cond, negative):
            keys = torch.cat([mask.bool(), mask.new_ones(len(mask), tokens.shape[1]).bool()], dim=1)
            positions = torch.arange(keys.shape[1])
            out, _ = model(tokens, features, positions, mask=text_attention_mask(keys))
            logits.append(out[:, -1])
        best = (logits[1] + scale * (logits[0] - logits[1])).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    return tokens


@pytest.mark.parametrize("one_for_all", [True, False])
def test_images_are_led_away_from_the_negative_caption(one_for_all):
    model = random_model(model_type="t2i", cls_token_num=4)
    torch.manual_seed(1)
    cond = captions(2, [4, 2], 4)
    negative = captions(2, [1, 3], 4)
    given = tuple(part[:1] for part in negative) if one_for_all else negative
    tokens = generate(model, cond[0], 6, cond[1], cfg_scale=3.0, negative=given, **GREEDY)
    negative = tuple(part.expand(2, *part.shape[1:]) for part in given)
    assert torch.equal(tokens.long(), guided_by_hand(model, cond, negative, 3.0, 6))
    without = generate(model, cond[0], 6, cond[1], cfg_scale=3.0, **GREEDY)
    assert not torch.equal(tokens, without)


def test_the_empty_caption_as_negative_is_the_default():
    model = random_model(model_type="t2i", cls_token_num=4)
    features, mask = captions(2, [4, 2], 4)
    empty = model.cls_embedding.null_condition(features[:1])
    expected = generate(model, features, 6, cfg_scale=2.0, **GREEDY)
    assert torch.equal(generate(model, features, 6, cfg_scale=2.0, negative=(empty, mask[:1]), **GREEDY), expected)


def test_negative_captions_that_do_not_fit_are_refused():
    model = random_model(model_type="t2i", cls_token_num=4)
    features, mask = captions(3, [4, 2, 1], 4)
    with pytest.raises(ValueError, match="for one or all of them"):
        generate(model, features, 2, mask, cfg_scale=2.0, negative=(features[:2], mask[:2]))
    with pytest.raises(ValueError, match="a class label has none"):
        generate(random_model(), torch.tensor([1]), 2, cfg_scale=2.0, negative=(features[:1], mask[:1]))
