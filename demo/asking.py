"""From the page's controls to a request: what they offer for a model, and what their values mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoregressive.serve.cards import Card
from autoregressive.serve.requests import LARGEST_SEED, BadRequest, Edit, Request, Sampling
from dataset.imagenet_names import NUM_CLASSES, imagenet_names
from demo.about import codes_of

MOST_PICTURES = 16
LONGEST_PROMPT = 1000  # letters
FIRST_SEED = 42
FIRST_CLASS = "llama"  # where a model has it
_GUIDANCE = (1.0, 25.0)


@dataclass(frozen=True)
class Start:
    """What the controls of a model show first, and how far they go."""

    cfg_scale: float
    top_k: int
    top_p: float
    temperature: float
    seed: int
    most_guidance: float
    most_codes: int
    most_temperature: float


def start_of(card: Card, seed: int | None = None) -> Start:
    """Start values from the card; ranges are the established ones, or wider where a start value needs it."""
    sampling, codes = card.sampling, codes_of(card)
    return Start(
        max(sampling["cfg_scale"], _GUIDANCE[0]),
        min(sampling["top_k"] or codes, codes),
        sampling["top_p"],
        sampling["temperature"],
        FIRST_SEED if seed is None else seed,
        max(_GUIDANCE[1], sampling["cfg_scale"]),
        codes,
        max(1.0, sampling["temperature"]),
    )


def class_choices(card: Card) -> list[tuple[str, int]]:
    """The classes as (what the picker shows, id), by name; ImageNet's in English and Chinese."""
    classes = card.classes
    if classes is None:
        raise ValueError(f"{card.name} draws texts, it has no classes")
    if classes.names is not None and list(classes.names) == imagenet_names():
        from tools.imagenet_en_cn import IMAGENET_1K_CLASSES  # here, as it is large

        return [(IMAGENET_1K_CLASSES[i], i) for i in range(NUM_CLASSES)]
    named = [(classes.name(i) or f"class {i}", i) for i in range(classes.num_classes)]
    return sorted(named, key=lambda choice: choice[0].lower()) if classes.names else named


def first_class(card: Card) -> int:
    """The class that is picked when the page opens: an example of the card, or one that the picker offers."""
    names = (card.classes.names if card.classes else None) or []
    known = [name for name in (*card.examples, FIRST_CLASS) if name in names]
    return names.index(known[0]) if known else class_choices(card)[0][1]


def request_of(card: Card, values: Mapping[str, Any], edit: Edit | None = None) -> Request:
    """The request that the controls' `values` make: subject, n, seed, cfg_scale, top_k, top_p, temperature.

    Raises:
        BadRequest: a value that cannot be drawn, in words for the person at the page.
    """
    n = _whole(values["n"], "number of images", "n")
    if not 1 <= n <= MOST_PICTURES:
        raise BadRequest(f"The number of images is 1 to {MOST_PICTURES}, not {n}.", "n")
    sampling = Sampling(
        _number(values["cfg_scale"], "guidance", "cfg_scale"),
        _whole(values["top_k"], "top-k", "top_k"),
        _number(values["top_p"], "top-p", "top_p"),
        _number(values["temperature"], "temperature", "temperature"),
    )
    request = Request(card.name, _subject(card, values["subject"]), sampling, seed_of(values["seed"]), n, edit, True)
    request.check(card)
    return request


def seed_of(text: Any) -> int:
    """The seed that somebody typed. BadRequest when it is none."""
    word = str(text if text is not None else "").strip()
    digits = word.lstrip("0") or word[-1:]
    if not (word.isascii() and word.isdigit() and len(digits) <= 10 and int(digits) <= LARGEST_SEED):
        raise BadRequest(f"The seed is a whole number from 0 to {LARGEST_SEED}, not {_quoted(word)}.", "seed")
    return int(digits)


def _subject(card: Card, value: Any) -> int | str:
    if card.classes is not None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRequest("Pick a class first: type a part of its name and choose it from the list.", "class")
        return value
    prompt = " ".join(str(value or "").split())
    if not prompt:
        raise BadRequest("Write a prompt first: what should the picture show?", "prompt")
    if len(prompt) > LONGEST_PROMPT:
        raise BadRequest(f"The prompt has {len(prompt)} letters; {LONGEST_PROMPT} are the most.", "prompt")
    return prompt


def _number(value: Any, what: str, param: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequest(f"The {what} must be a number, not {_quoted(value)}.", param)
    return float(value)


def _whole(value: Any, what: str, param: str) -> int:
    number = _number(value, what, param)
    if not number.is_integer():
        raise BadRequest(f"The {what} must be a whole number, not {value}.", param)
    return int(number)


def _quoted(value: Any) -> str:
    word = "" if value is None else str(value)
    return f"“{word[:40]}{'…' if len(word) > 40 else ''}”" if word else "nothing"
