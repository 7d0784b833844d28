"""What clients send, right and wrong, becomes our own types or an error that names the field."""

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from autoregressive.serve.parameters import UnknownModel, edit_of, fields_of_form, fields_of_json, wanted_of
from autoregressive.serve.requests import LARGEST_SEED, BadRequest
from tests.autoregressive.serve.tiny import tiny_cards

NOISE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return {card.name: card for card in tiny_cards(tmp_path_factory.mktemp("cards"))}


def asked(cards, **fields):
    return wanted_of(fields_of_json(json.dumps(fields).encode()), cards, 8)


def refusal(call, *args, **kwargs):
    with pytest.raises(BadRequest) as refused:
        call(*args, **kwargs)
    return refused.value.param, str(refused.value)


def test_everything_that_can_be_asked_for(cards):
    wanted = asked(
        cards, model="tiny-class", prompt="Blue Square", n=3, size="16x16", seed=7, response_format="url",
        output_format="png", guidance_scale=3, top_k=5, top_p=0.5, temperature=0.25, stream=True, partial_images=2,
        progress=True, user="me", quality="auto", background=None,
    )  # fmt: skip
    request = wanted.request
    assert (request.model, request.subject, request.seed, request.n, request.previews) == ("tiny-class", 1, 7, 3, True)
    assert vars(request.sampling) == {"cfg_scale": 3.0, "top_k": 5, "top_p": 0.5, "temperature": 0.25}
    assert (wanted.stream, wanted.partial_images, wanted.progress, wanted.as_url) == (True, 2, True, True)


def test_what_is_left_out_is_the_models_own(cards):
    wanted = asked(cards, **{"class": 2})
    assert vars(wanted.request.sampling) == cards["tiny-class"].sampling
    assert (wanted.request.subject, wanted.request.n, wanted.stream, wanted.as_url) == (2, 1, False, False)
    assert len({asked(cards, prompt="1").request.seed for _ in range(5)}) == 5  # chosen at random
    text = asked(cards, model="tiny-text", prompt="a red cat").request
    assert text.subject == "a red cat" and text.sampling.cfg_scale == 7.5


def test_both_names_of_guidance(cards):
    assert asked(cards, prompt="1", cfg_scale=2.5).request.sampling.cfg_scale == 2.5
    assert refusal(asked, cards, prompt="1", cfg_scale=2.5, guidance_scale=3)[0] == "guidance_scale"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "1", "class": 1}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "no such thing"}, "prompt"),
        ({"prompt": "x" * 201}, "prompt"),
        ({"class": 3}, "class"),
        ({"class": -1}, "class"),
        ({"class": 10**400}, "class"),
        ({"class": True}, "class"),
        ({"class": [1]}, "class"),
        ({"prompt": "1", "n": 0}, "n"),
        ({"prompt": "1", "n": 9}, "n"),
        ({"prompt": "1", "n": 1.0}, "n"),
        ({"prompt": "1", "n": "1"}, "n"),
        ({"prompt": "1", "n": True}, "n"),
        ({"prompt": "1", "n": 10**1000}, "n"),
        ({"prompt": "1", "size": "1024x1024"}, "size"),
        ({"prompt": "1", "seed": -1}, "seed"),
        ({"prompt": "1", "seed": LARGEST_SEED + 1}, "seed"),
        ({"prompt": "1", "seed": 1.5}, "seed"),
        ({"prompt": "1", "guidance_scale": 1e300}, "cfg_scale"),
        ({"prompt": "1", "guidance_scale": 10**400}, "cfg_scale"),
        ({"prompt": "1", "top_p": -0.1}, "top_p"),
        ({"prompt": "1", "top_p": "1"}, "top_p"),
        ({"prompt": "1", "top_k": -1}, "top_k"),
        ({"prompt": "1", "top_k": 2**31}, "top_k"),
        ({"prompt": "1", "temperature": 11}, "temperature"),
        ({"prompt": "1", "temperature": False}, "temperature"),
        ({"prompt": "1", "response_format": "jpg"}, "response_format"),
        ({"prompt": "1", "output_format": "webp"}, "output_format"),
        ({"prompt": "1", "quality": "hd"}, "quality"),
        ({"prompt": "1", "stream": 1}, "stream"),
        ({"prompt": "1", "partial_images": 2}, "stream"),
        ({"prompt": "1", "stream": True, "partial_images": 101}, "partial_images"),
        ({"prompt": "1", "stylish": 1}, "stylish"),
        ({"prompt": "1", "model": "tiny"}, "model"),
        ({"model": "tiny-text"}, "prompt"),
        ({"model": "tiny-text", "prompt": "1", "class": 1}, "class"),
        ({"model": "tiny-text", "prompt": "x" * 4001}, "prompt"),
        ({"model": "tiny-text", "prompt": "a\0b"}, "prompt"),
        ({"model": "tiny-text", "prompt": "a\ud800b"}, "prompt"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_by_name(cards, fields, param):
    assert refusal(asked, cards, **fields)[0] == param


def test_an_unknown_model_is_told_apart(cards):
    with pytest.raises(UnknownModel, match="there are: tiny-class, tiny-text"):
        asked(cards, prompt="1", model="dall-e-3")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"1", b"null", b'"x"', b"{'n': 1}", b'{"n": 1', b"\xff\xfe", b'{"prompt": "\xff"}',
        b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"temperature": -Infinity}',
        b'{"n": ' + b"9" * 5000 + b"}", b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[" * 200_000,
        b'{"n": ' + b'{"n": ' * 50_000, b'{"n": 1}}', b'{"n" 1}', b"\0" * 100, b'{"prompt": "a\nb"}',
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_bodies_that_are_no_json(body):
    refusal(fields_of_json, body)


def test_a_number_beyond_all_floats_is_refused(cards):
    assert fields_of_json(b'{"temperature": 1e999}')["temperature"] == math.inf
    assert refusal(wanted_of, fields_of_json(b'{"prompt": "1", "temperature": 1e999}'), cards, 8)[0] == "temperature"


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = SIMPLE | st.lists(SIMPLE, max_size=2) | st.dictionaries(st.text(max_size=2), SIMPLE, max_size=2)
NAMES = st.sampled_from(["model", "prompt", "class", "n", "size", "seed", "top_k", "top_p", "temperature", "stream"])


@given(st.dictionaries(NAMES | st.text(max_size=3), JSON, max_size=6))
def test_whatever_is_sent_is_a_request_or_a_bad_one(cards, content):
    try:
        wanted = wanted_of(fields_of_json(json.dumps(content).encode()), cards, 8)
    except BadRequest as refused:
        json.dumps(str(refused)), json.dumps(refused.param)
    else:
        wanted.request.check(wanted.card)


def test_forms_hold_the_same_as_texts():
    form = {"prompt": "5", "n": "2", "top_p": "0.5", "stream": "True", "seed": " 7", "class": "5"}
    assert fields_of_form(form) == {"prompt": "5", "n": 2, "top_p": 0.5, "stream": True, "seed": 7, "class": 5}
    assert fields_of_form({"class": "5 stars"}) == {"class": "5 stars"}
    for name, text in (("n", "two"), ("n", "9" * 5000), ("top_p", ""), ("stream", "yes"), ("other", "1")):
        assert refusal(fields_of_form, {name: text})[0] == name


def png(pixels, mode=None):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format=mode or "PNG")
    return content.getvalue()


def transparent(*cells):
    """A 16 x 16 RGBA picture that is transparent in these cells of 4 x 4 pixels."""
    alpha = np.full((4, 4), 255, np.uint8)
    alpha.flat[list(cells)] = 0
    return np.dstack([NOISE, alpha.repeat(4, 0).repeat(4, 1)])


def test_an_edit_draws_where_the_mask_is_transparent(cards):
    card = cards["tiny-class"]
    edit = edit_of(png(NOISE), png(transparent(5, 15)), card)
    assert edit.mask.nonzero()[0].tolist() == [5, 15] and np.array_equal(edit.picture, NOISE)
    own = edit_of(png(transparent(0)), None, card)
    assert own.mask.nonzero()[0].tolist() == [0] and np.array_equal(own.picture, NOISE)


def test_an_edit_of_another_size_is_scaled_and_cut_like_any_image(cards):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = NOISE.repeat(2, 0).repeat(2, 1)
    mask = np.full((32, 64, 4), 255, np.uint8)
    mask[:8, 16:24, 3] = 0  # of the central square the first cell
    mask[:, :16, 3] = 0  # outside of it
    edit = edit_of(png(wide), png(mask), cards["tiny-class"])
    assert edit.mask.nonzero()[0].tolist() == [0] and np.array_equal(edit.picture, NOISE)


@pytest.mark.parametrize(
    ("image", "mask", "param", "reason"),
    [
        (b"", None, "image", "no picture"),
        (b"GIF89a" + bytes(100), None, "image", "no picture"),
        (png(NOISE)[:200], png(transparent(1)), "image", "no picture"),
        (png(NOISE, "BMP"), png(transparent(1)), "image", "no picture"),
        (png(NOISE), None, "mask", "no transparency"),
        (png(NOISE), png(NOISE), "mask", "no transparency"),
        (png(NOISE), b"\x89PNG\r\n\x1a\n", "mask", "no picture"),
        (png(NOISE), png(transparent()), "mask", "nothing is chosen"),
        (png(NOISE[:8]), png(transparent(1)), "mask", "16 x 16"),
        (png(np.zeros((5000, 4000), np.uint8)), png(transparent(1)), "image", "4096"),
    ],
)
def test_edits_that_cannot_be(cards, image, mask, param, reason):
    name, message = refusal(edit_of, image, mask, cards["tiny-class"])
    assert name == param and reason in message
