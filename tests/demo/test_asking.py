"""What people type becomes a request, or a sentence that says what is wrong."""

import math
from dataclasses import replace

import pytest

from autoregressive.serve.cards import card_of_args, card_parser
from autoregressive.serve.requests import LARGEST_SEED, BadRequest
from demo.about import codes_of
from demo.asking import MOST_PICTURES, class_choices, first_class, request_of, seed_of, start_of

VALUES = {"subject": 1, "n": 2, "seed": " 7 ", "cfg_scale": 3, "top_k": 9.0, "top_p": 1, "temperature": 0}


def imagenet_card(*flags):
    return card_of_args(card_parser().parse_args(["--gpt-ckpt", "c2i_XL_384.pt", "--vq-ckpt", "vq.pt", *flags]))


def test_controls_become_a_request(of_classes, of_texts):
    request = request_of(of_classes, VALUES)
    assert (request.model, request.subject, request.seed, request.n) == ("tiny-class", 1, 7, 2)
    assert vars(request.sampling) == {"cfg_scale": 3.0, "top_k": 9, "top_p": 1.0, "temperature": 0.0}
    assert request.previews
    assert request_of(of_texts, {**VALUES, "subject": "  a \n red  cat "}).subject == "a red cat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "abc"}, "seed is a whole number .* not “abc”"),
        ({"seed": "-1"}, "not “-1”"),
        ({"seed": "1.5"}, "not “1.5”"),
        ({"seed": ""}, "not nothing"),
        ({"seed": None}, "not nothing"),
        ({"seed": "²"}, "seed is a whole number"),
        ({"seed": str(LARGEST_SEED + 1)}, f"0 to {LARGEST_SEED}"),
        ({"seed": "9" * 5000}, "seed is a whole number"),
        ({"n": 0}, f"1 to {MOST_PICTURES}, not 0"),
        ({"n": 17}, f"1 to {MOST_PICTURES}, not 17"),
        ({"n": None}, "number of images must be a number"),
        ({"n": 1.5}, "whole number"),
        ({"cfg_scale": None}, "guidance must be a number"),
        ({"temperature": math.nan}, "temperature is 0 to 10"),
        ({"top_k": -1}, "top_k is 0"),
        ({"subject": None}, "Pick a class"),
        ({"subject": "dog"}, "Pick a class"),
        ({"subject": 3}, "classes are 0 to 2"),
    ],
)
def test_a_mistake_is_told_in_words(of_classes, change, message):
    with pytest.raises(BadRequest, match=message):
        request_of(of_classes, {**VALUES, **change})


@pytest.mark.parametrize("prompt", ["", " \n ", None])
def test_a_prompt_is_needed(of_texts, prompt):
    with pytest.raises(BadRequest, match="Write a prompt"):
        request_of(of_texts, {**VALUES, "subject": prompt})


def test_a_prompt_has_a_length(of_texts):
    request_of(of_texts, {**VALUES, "subject": "a" * 1000})
    with pytest.raises(BadRequest, match="1001 letters"):
        request_of(of_texts, {**VALUES, "subject": "a" * 1001})


def test_every_seed_is_one(of_classes):
    assert [seed_of(text) for text in ("0", "007", LARGEST_SEED)] == [0, 7, LARGEST_SEED]


def test_the_established_ranges_and_start_values():
    start = start_of(imagenet_card("--top-k", "4000"))
    assert (start.cfg_scale, start.top_k, start.top_p, start.temperature, start.seed) == (4.0, 4000, 1.0, 1.0, 42)
    assert (start.most_guidance, start.most_codes, start.most_temperature) == (25.0, 16384, 1.0)


def test_ranges_follow_the_model(of_classes):
    start = start_of(of_classes, seed=5)
    assert (start.top_k, start.most_codes, start.seed) == (64, 64, 5)  # the card says 0: all of its 64 codes
    wide = start_of(imagenet_card("--temperature", "1.4", "--cfg-scale", "30"))
    assert (wide.most_temperature, wide.most_guidance) == (1.4, 30)
    assert codes_of(imagenet_card("--quantizer", "fsq", "--fsq-levels", "8", "5", "5")) == 200


def test_the_first_class_is_among_the_names():
    card = imagenet_card()
    choices = class_choices(card)
    assert len(choices) == 1000 and [i for _, i in choices] == list(range(1000))
    first = first_class(card)
    assert first == 355 and choices[first][0].startswith("llama [")
    assert [text for text, i in choices if "tabby" in text] and len({text for text, _ in choices}) == 1000


def test_classes_of_other_models(of_classes):
    assert class_choices(of_classes) == [("blue square", 1), ("green star", 2), ("red circle", 0)]
    assert first_class(of_classes) == 1
    assert first_class(replace(of_classes, examples=("llama", "green star"))) == 2
    nameless = imagenet_card("--num-classes", "3")
    assert class_choices(nameless) == [("class 0", 0), ("class 1", 1), ("class 2", 2)] and first_class(nameless) == 0
