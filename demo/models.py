"""From app.py's flags to what the page draws with: models on this machine, or a server."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoregressive.serve.cards import Card, add_card_args, bundled_cards, card_of_args, card_parser, read_card

# Established defaults that differ from the samplers'. --top-k was a flag that nobody read; the page began with 4000.
ESTABLISHED: dict[str, dict[str, Any]] = {"c2i": {"gpt_model": "GPT-XL", "top_k": 4000}, "t2i": {"gpt_model": "GPT-XL"}}
_SMALLER_PICTURES = {"GPT-B": 256}  # of classes; released at this size alone
SAMPLING = ("cfg_scale", "top_k", "top_p", "temperature")
_OF_ANY_MODEL = (*SAMPLING, "device", "num_threads", "engine", "compile", "quantize", "precision")
_UNSET: Any = object()


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say which models."""
    text = "JSON file that describes a model, as those in pretrained/emoji; repeatable"
    flags.add_argument("--card", action="append", metavar="FILE", help=text)
    add_card_args(flags)
    flags.set_defaults(**ESTABLISHED["c2i"])


def given_flags(flags: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The values of the flags that somebody typed, without the defaults of the others."""
    names = [action.dest for action in flags._actions if action.default is not None]
    typed = vars(flags.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, _UNSET))))
    return {name: value for name, value in typed.items() if value is not _UNSET and value is not None}


def cards_of(given: dict[str, Any]) -> list[Card]:
    """The given models, or the bundled ones, with the `given` flags of a model.

    Raises:
        ValueError: one of the two checkpoints is missing, or there are flags of a model and no checkpoint at all.
    """
    given, files = {name: value for name, value in given.items() if name != "card"}, given.get("card")
    missing = [name for name in ("vq_ckpt", "gpt_ckpt") if not given.get(name)]
    if not missing:
        if files:
            raise ValueError("give --card, or --vq-ckpt and --gpt-ckpt, not both")
        return [card_of_args(_complete(given))]
    if len(missing) == 1:
        raise ValueError(f"--{missing[0].replace('_', '-')} is missing: a model is a tokenizer and a GPT, give both")
    useless = [name for name in given if name not in _OF_ANY_MODEL]
    if useless:
        raise ValueError(
            f"--{useless[0].replace('_', '-')} describes a model, but there is none: give --vq-ckpt and --gpt-ckpt as "
            f"well, or no flag of a model for those that come with the project"
        )
    return [with_values(card, given) for card in (map(read_card, files) if files else bundled_cards())]


def cards_of_server(cards: Mapping[str, Card], given: dict[str, Any]) -> dict[str, Card]:
    """The models of a server with the start values that are `given`.

    Raises:
        ValueError: there are other flags of a model, which a server chooses by itself.
    """
    useless = [name for name in given if name not in SAMPLING]
    if useless:
        raise ValueError(f"--{useless[0].replace('_', '-')} is for models in this process; the server has its own")
    return {name: with_values(card, given) for name, card in cards.items()}


def with_values(card: Card, values: dict[str, Any]) -> Card:
    """The card with other values of some flags."""
    return replace(card, args=argparse.Namespace(**{**vars(card.args), **values}))


def _complete(given: dict[str, Any]) -> argparse.Namespace:
    kind = given.get("gpt_type", "c2i")
    args = card_parser(kind).parse_args([])
    values = {**vars(args), **ESTABLISHED[kind]}
    model = given.get("gpt_model", values["gpt_model"])
    if kind == "c2i" and model in _SMALLER_PICTURES:
        values["image_size"] = _SMALLER_PICTURES[model]
    return argparse.Namespace(**{**values, **given})
