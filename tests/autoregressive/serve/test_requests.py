"""What is refused before anything is drawn, and what is noted of a picture."""

import math

import numpy as np
import pytest

from autoregressive.serve.requests import LARGEST_SEED, BadRequest, Edit, Request, Sampling
from tests.autoregressive.serve.tiny import tiny_cards

PLAIN = Sampling(cfg_scale=2.0, top_k=0, top_p=1.0, temperature=1.0)
PICTURE, MASK = np.zeros((16, 16, 3), np.uint8), np.arange(16) > 8


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return {card.name: card for card in tiny_cards(tmp_path_factory.mktemp("cards"))}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"cfg_scale": math.nan}, "cfg_scale"),
        ({"cfg_scale": 101}, "cfg_scale"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_sampling_that_means_nothing(change, param):
    with pytest.raises(BadRequest) as refused:
        Sampling(**{**vars(PLAIN), **change})
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("model", "change", "param"),
    [
        ("tiny-class", {"subject": 3}, "class"),
        ("tiny-class", {"subject": -1}, "class"),
        ("tiny-class", {"subject": "a cat"}, "prompt"),
        ("tiny-text", {"subject": 1}, "prompt"),
        ("tiny-class", {"n": 0}, "n"),
        ("tiny-class", {"seed": -1}, "seed"),
        ("tiny-class", {"seed": LARGEST_SEED + 1}, "seed"),
        ("tiny-class", {"edit": Edit(PICTURE[:8], MASK)}, "image"),
        ("tiny-class", {"edit": Edit(PICTURE.astype(float), MASK)}, "image"),
        ("tiny-class", {"edit": Edit(PICTURE, MASK[:8])}, "mask"),
        ("tiny-class", {"edit": Edit(PICTURE, MASK & False)}, "mask"),
    ],
)
def test_requests_that_the_model_cannot_draw(cards, model, change, param):
    subject = 1 if model == "tiny-class" else "a cat"
    Request(model, subject, PLAIN).check(cards[model])
    with pytest.raises(BadRequest) as refused:
        Request(**{"model": model, "subject": subject, "sampling": PLAIN, **change}).check(cards[model])
    assert refused.value.param == param


def test_the_facts_of_a_picture_are_enough_to_draw_it_again(cards):
    facts = Request("tiny-class", 2, PLAIN, seed=5).facts(cards["tiny-class"], 3)
    assert facts["seed"] == 8 and facts["class_id"] == 2 and facts["class_name"] == "green star"
    assert facts["settings"] == {"cfg_scale": 2.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    assert Request("tiny-text", "a cat", PLAIN).facts(cards["tiny-text"], 0)["prompt"] == "a cat"
    edit = Request("tiny-class", 2, PLAIN, edit=Edit(PICTURE, MASK))
    assert "cells" not in facts and edit.facts(cards["tiny-class"], 0)["cells"] == list(range(9, 16))
