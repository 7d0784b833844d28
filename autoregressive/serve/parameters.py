"""From what a client sends to a request: the one place where untrusted bytes become our own types."""

from __future__ import annotations

import io
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from autoregressive.sample.masks import of_alpha
from autoregressive.serve.cards import Card
from autoregressive.serve.requests import BadRequest, Edit, Request, Sampling
from dataset.augmentation import center_crop_arr

MOST_PARTIAL_IMAGES = 100
_MOST_PIXELS = 4096 * 4096  # of a picture that is sent to be edited
_LONGEST_PROMPT, _LONGEST_NAME = 4000, 200
_FORMATS = ("PNG", "JPEG", "WEBP")

_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "prompt": (str,),
    "class": (int, str),
    "n": (int,),
    "size": (str,),
    "seed": (int,),
    "response_format": (str,),
    "output_format": (str,),
    "guidance_scale": (int, float),
    "cfg_scale": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "temperature": (int, float),
    "stream": (bool,),
    "partial_images": (int,),
    "progress": (bool,),
    "user": (str,),  # clients send it for records that are not kept here
    "quality": (str,),
    "background": (str,),
    "moderation": (str,),
}
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_ONLY = {  # values with one meaning here: whatever the model does
    "output_format": ("png",),
    "response_format": ("b64_json", "url"),
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
}


class UnknownModel(BadRequest):
    """There is no model of that name."""


@dataclass(frozen=True)
class Wanted:
    """A request of the API, and in which form its answer is wanted."""

    request: Request
    card: Card
    stream: bool = False
    partial_images: int = 0
    progress: bool = False
    as_url: bool = False


def fields_of_json(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object; those that are null are left out.

    Raises:
        BadRequest: no JSON object, or fields that are unknown or of another type.
    """
    try:
        content = json.loads(body.decode(), parse_constant=_no_number)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError, and integers of thousands of digits
        raise BadRequest(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise BadRequest("the body must be a JSON object")
    fields = {name: value for name, value in content.items() if value is not None}
    for name, value in fields.items():
        _check_known(name)
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and bool not in _TYPES[name]):
            kinds = (float,) if float in _TYPES[name] else _TYPES[name]
            expected = " or ".join(_WORDS[kind] for kind in kinds)
            raise BadRequest(f"{name} must be {expected}, not {_shown(value)}", name)
    return fields


def fields_of_form(form: Mapping[str, str]) -> dict[str, Any]:
    """The same from the texts of a form."""
    fields = {}
    for name, text in form.items():
        _check_known(name)
        fields[name] = _read(name, text)
    return fields


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _check_known(name: str) -> None:
    if name not in _TYPES:
        raise BadRequest(f"unknown field {_shown(name)}; known are {', '.join(_TYPES)}", name[:_LONGEST_NAME])


def _read(name: str, text: str) -> Any:
    kinds = _TYPES[name]
    try:
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
        if str in kinds:
            return int(text) if int in kinds and text.isdecimal() else text
        return float(text) if float in kinds else int(text)
    except (KeyError, ValueError):
        raise BadRequest(f"{name} must be {_WORDS[kinds[-1]]}, not {_shown(text)}", name) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def wanted_of(fields: Mapping[str, Any], cards: Mapping[str, Card], max_n: int, edit: Edit | None = None) -> Wanted:
    """What is asked for, checked against the models.

    Raises:
        BadRequest: a value that means nothing, or that the model cannot draw.
        UnknownModel: a name of none of `cards`.
    """
    card = model_of(fields, cards)
    for name, values in _ONLY.items():
        if fields.get(name, values[0]) not in values:
            raise BadRequest(f"{name} is {' or '.join(values)}, not {_shown(fields[name])}", name)
    n = fields.get("n", 1)
    if not 1 <= n <= max_n:
        raise BadRequest(f"n is 1 to {max_n}, not {_shown(n)}", "n")
    size = f"{card.edge}x{card.edge}"
    if fields.get("size", "auto") not in ("auto", size):
        raise BadRequest(f"size is auto or {size} for {card.name}, not {_shown(fields['size'])}", "size")
    partial_images = fields.get("partial_images", 0)
    if not 0 <= partial_images <= MOST_PARTIAL_IMAGES:
        raise BadRequest(f"partial_images is 0 to {MOST_PARTIAL_IMAGES}, not {partial_images}", "partial_images")
    stream = fields.get("stream", False)
    if not stream and (partial_images or fields.get("progress")):
        raise BadRequest("partial_images and progress need stream: true", "stream")
    seed = fields["seed"] if "seed" in fields else secrets.randbelow(2**31)
    sampling = _sampling(fields, card)
    request = Request(card.name, _subject(fields, card), sampling, seed, n, edit, previews=partial_images > 0)
    request.check(card)
    as_url = fields.get("response_format") == "url"
    return Wanted(request, card, stream, partial_images, fields.get("progress", False), as_url)


def model_of(fields: Mapping[str, Any], cards: Mapping[str, Card]) -> Card:
    """The card that is asked for, the first if none is."""
    name = fields.get("model", next(iter(cards)))
    if name not in cards:
        raise UnknownModel(f"there is no model {_shown(name)}; there are: {', '.join(cards)}", "model")
    return cards[name]


def _sampling(fields: Mapping[str, Any], card: Card) -> Sampling:
    values = {name: fields.get(name, default) for name, default in card.sampling.items()}
    if "guidance_scale" in fields:
        if fields.get("cfg_scale", fields["guidance_scale"]) != fields["guidance_scale"]:
            raise BadRequest("guidance_scale and cfg_scale are the same; give one of them", "guidance_scale")
        values["cfg_scale"] = fields["guidance_scale"]
    if values["top_k"] >= 2**31:
        raise BadRequest(f"top_k is 0 (all codes) or more, not {_shown(values['top_k'])}", "top_k")
    for name in ("cfg_scale", "top_p", "temperature"):
        try:
            values[name] = float(values[name])
        except OverflowError:
            values[name] = math.inf
    return Sampling(**values)


def _subject(fields: Mapping[str, Any], card: Card) -> int | str:
    """The class id or the prompt."""
    if card.classes is None:
        if "class" in fields:
            raise BadRequest(f"{card.name} draws texts: give a prompt, no class", "class")
        if "prompt" not in fields:
            raise BadRequest("prompt is missing: what shall be drawn?", "prompt")
        return _clean(fields["prompt"], "prompt", _LONGEST_PROMPT)
    given = [name for name in ("class", "prompt") if name in fields]
    if len(given) != 1:
        what = "class or prompt is missing" if not given else "class and prompt are both given"
        raise BadRequest(f"{what}: {card.name} draws classes, give a name or a number as one of them", "prompt")
    value = fields[given[0]]
    if isinstance(value, int):
        return value
    try:
        return card.classes.find(_clean(value, given[0], _LONGEST_NAME).strip())
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(str(error), given[0]) from None


def _clean(text: str, name: str, longest: int) -> str:
    if len(text) > longest:
        raise BadRequest(f"{name} has {len(text)} characters; at most {longest} are read", name)
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRequest(f"{name} has characters that are no text", name)
    return text


def edit_of(image: bytes, mask: bytes | None, card: Card) -> Edit:
    """The edit of an uploaded picture: cells in which the mask, else the picture itself, is transparent are drawn anew.

    Both are cut to a central square of the model's size.

    Raises:
        BadRequest: files that are no pictures, of different sizes, or without transparency.
    """
    picture = open_picture(image, "image")
    source, name = (picture, "image") if mask is None else (open_picture(mask, "mask"), "mask")
    if source.size != picture.size:
        raise BadRequest(f"the mask is {_size(source)} pixels, but the image {_size(picture)}", "mask")
    if "A" not in source.getbands() and "transparency" not in source.info:
        raise BadRequest(f"the {name} has no transparency: what is drawn anew is where it is transparent", "mask")
    alpha = source.convert("RGBA").getchannel("A")
    cells = of_alpha(alpha, card.grid, card.edge // card.grid).numpy()
    pixels = np.array(center_crop_arr(picture.convert("RGBA").convert("RGB"), card.edge))
    edit = Edit(pixels, cells)
    edit.check(card)
    return edit


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"


def open_picture(content: bytes, name: str, most_pixels: int = _MOST_PIXELS) -> Image.Image:
    """Somebody's picture, decoded; only harmless formats are tried.

    Raises:
        BadRequest: it is none, broken or too large.
    """
    try:
        picture = Image.open(io.BytesIO(content), formats=_FORMATS)
        if picture.width * picture.height <= most_pixels:
            picture.load()
            return picture
    except Exception:  # each decoder has exceptions of its own
        raise BadRequest(f"the {name} is no picture that can be read ({', '.join(_FORMATS)})", name) from None
    edge = math.isqrt(most_pixels)
    raise BadRequest(f"the {name} is too large: {_size(picture)} pixels; at most {edge} x {edge} are read", name)
