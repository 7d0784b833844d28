"""From app.py's flags to what the page draws with: models on this machine, or a server."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from autoregressive.serve.cards import SAMPLING, Card, add_card_args, cards_of, with_values

# Established defaults that differ from the samplers'. --top-k was a flag that nobody read; the page began with 4000.
ESTABLISHED: dict[str, dict[str, Any]] = {"c2i": {"gpt_model": "GPT-XL", "top_k": 4000}, "t2i": {"gpt_model": "GPT-XL"}}
_SMALLER_PICTURES = {"GPT-B": 256}  # of classes; released at this size alone


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say which models."""
    text = "JSON file that describes a model, as those in pretrained/emoji; repeatable"
    flags.add_argument("--card", action="append", metavar="FILE", help=text)
    add_card_args(flags)
    flags.set_defaults(**ESTABLISHED["c2i"])


def page_cards(given: Mapping[str, Any]) -> list[Card]:
    """The models that the `given` flags say, with the established defaults; see `cards.cards_of`."""
    of_model = {name: value for name, value in given.items() if name != "card"}
    kind = given.get("gpt_type", "c2i")
    defaults = dict(ESTABLISHED[kind])
    if kind == "c2i" and given.get("gpt_model") in _SMALLER_PICTURES:
        defaults["image_size"] = _SMALLER_PICTURES[given["gpt_model"]]
    return cards_of(of_model, given.get("card", ()), defaults)


def cards_of_server(cards: Mapping[str, Card], given: dict[str, Any]) -> dict[str, Card]:
    """The models of a server with the start values that are `given`.

    Raises:
        ValueError: there are other flags of a model, which a server chooses by itself.
    """
    useless = [name for name in given if name not in SAMPLING]
    if useless:
        raise ValueError(f"--{useless[0].replace('_', '-')} is for models in this process; the server has its own")
    return {name: with_values(card, given) for name, card in cards.items()}
