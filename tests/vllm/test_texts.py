"""Codes of captions from vLLM are those of `generate`, whatever the captions' lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.autoregressive.models.tiny import captions
from tests.vllm.engines import drawn, engine, greedy, tiny

POSITIONS = 12
TEXT = {"model_type": "t2i", "cls_token_num": POSITIONS, "caption_dim": 6}
SCALES = [4.0, 1.0, 7.5, 2.0]


@pytest.fixture(scope="module")
def model():
    return tiny(**TEXT)


@pytest.fixture(scope="module")
def llm(model, tmp_path_factory):
    return engine(model, tmp_path_factory.mktemp("gpt"))


def texts(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (B, 12, 6) and masks (B, 12) of captions of these lengths."""
    torch.manual_seed(seed)
    return captions(len(lengths), lengths, POSITIONS)


@pytest.mark.parametrize("lengths", [[12, 12, 12, 12], [12, 5, 1, 8]], ids=["full", "ragged"])
def test_greedy_codes(llm, model, lengths):
    features, masks = texts(lengths)
    codes = llm.generate(list(zip(features, masks)), cfg_scale=SCALES, temperature=0)
    assert torch.equal(codes, greedy(model, features, SCALES, emb_masks=masks))


def test_seeds_give_the_pictures_of_the_other_engines(llm, model):
    features, masks = texts([3, 12, 7, 1])
    options = {"cfg_scale": 3.0, "top_k": 40}
    codes = llm.generate(list(zip(features, masks)), seeds=5, **options)
    assert torch.equal(codes, drawn(model, features, range(5, 9), emb_masks=masks, **options))


def test_without_guidance(model, tmp_path):
    features, masks = texts([12, 5, 1, 8])
    llm = engine(model, tmp_path, guidance=False)
    want = greedy(model, features, [1.0] * 4, emb_masks=masks)
    assert torch.equal(llm.generate(list(zip(features, masks)), cfg_scale=1.0, temperature=0), want)


def test_captions_that_enter_piece_by_piece(model, tmp_path):
    features, masks = texts([12, 5, 1, 8])
    llm = engine(model, tmp_path, max_num_batched_tokens=5, max_images=3)
    want = greedy(model, features, SCALES, emb_masks=masks)
    assert torch.equal(llm.generate(list(zip(features, masks)), cfg_scale=SCALES, temperature=0), want)


@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix caching"])
def test_preempted_images_are_the_same(tmp_path, preemptions, caching):
    model = tiny(**TEXT, block_size=64)
    llm = engine(model, tmp_path, block_size=32, num_gpu_blocks_override=9, enable_prefix_caching=caching)
    features, masks = texts([12, 5, 1, 8, 12, 3, 9, 2])
    want = greedy(model, features, SCALES * 2, emb_masks=masks)
    assert torch.equal(llm.generate(list(zip(features, masks)), cfg_scale=SCALES * 2, temperature=0), want)
    assert preemptions() > 0


def test_captions_that_begin_alike_share_no_keys_unless_they_stand_alike(tmp_path):
    """With a cache of prefixes: 40 positions, of which the first 32 of both captions are the same."""
    model = tiny(**{**TEXT, "cls_token_num": 40})
    llm = engine(model, tmp_path, block_size=32, enable_prefix_caching=True)
    torch.manual_seed(0)
    long, _ = captions(1, [40], 40)
    short = torch.cat([torch.zeros(1, 4, 6), long[:, :36]], dim=1)  # its first 36 features, moved to the right
    features = torch.cat([long, short])
    masks = torch.tensor([[1] * 40, [0] * 4 + [1] * 36])
    want = greedy(model, features, [4.0, 4.0], emb_masks=masks)
    for i in (0, 1, 0):
        codes = llm.generate([(features[i], masks[i])], cfg_scale=4.0, temperature=0)
        assert torch.equal(codes, want[i : i + 1])


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (3, "expected the features of a caption"),
        ((torch.zeros(12, 7), torch.ones(12)), r"expected features \(12, 6\)"),
        ((torch.zeros(9, 6), torch.ones(9)), r"got \(9, 6\)"),
        ((torch.zeros(12, 6), torch.ones(11)), r"got \(12, 6\) and \(11,\)"),
        ((torch.zeros(12, 6), torch.zeros(12)), "not be empty"),
        ((torch.zeros(12, 6), torch.tensor([1] * 5 + [0] * 7)), "left-padded"),
        ((torch.full((12, 6), float("nan")), torch.ones(12)), "not finite"),
    ],
)
def test_mistakes_never_reach_the_engine(llm, condition, words):
    with pytest.raises(ValueError, match=words):
        llm.generate([condition])
    assert not llm.engine.has_unfinished_requests()
