"""What can be served: a model's name, what it draws, and the flags that load it. Nothing is loaded here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from autoregressive.build import checkpoint_tag, latent_grid
from autoregressive.sample.classes import ClassNames
from autoregressive.sample.pipeline import add_model_args
from autoregressive.sample.text import add_text_args
from utils.args import make_parser
from utils.files import read_json

EMOJI = Path(__file__).resolve().parents[2] / "pretrained" / "emoji"  # models that come with the project
_PATHS = ("gpt-ckpt", "vq-ckpt", "class-names")  # flags that name files


@dataclass(frozen=True)
class Card:
    """A model that can be drawn from. `args` are flags of `sample_c2i.py` or `sample_t2i.py`; `about` is for people."""

    name: str
    args: argparse.Namespace
    about: str = ""
    examples: tuple[str, ...] = ()  # prompts or classes to begin with
    class_names: tuple[str, ...] | None = None  # where no file has them

    @property
    def kind(self) -> str:
        """What it draws: "c2i" classes, "t2i" texts."""
        return self.args.gpt_type

    @property
    def edge(self) -> int:
        """Edge of its pictures in pixels."""
        return self.args.image_size

    @property
    def grid(self) -> int:
        """Codes along the edge of a picture."""
        return latent_grid(self.args)

    @cached_property
    def classes(self) -> ClassNames | None:
        """Its classes by id and name; None for a model of texts."""
        if self.kind != "c2i":
            return None
        return ClassNames(self.args.num_classes, self.args.class_names, self.class_names)

    @property
    def sampling(self) -> dict[str, Any]:
        """How it draws unless a request says otherwise."""
        return {name: getattr(self.args, name) for name in ("cfg_scale", "top_k", "top_p", "temperature")}


def card_parser(gpt_type: str = "c2i") -> argparse.ArgumentParser:
    """The flags that describe one model, with the defaults of the sampler of its kind."""
    flags = make_parser(None)
    add_card_args(flags, gpt_type)
    return flags


def add_card_args(flags: argparse.ArgumentParser, gpt_type: str = "c2i") -> None:
    """Add them to a command's flags."""
    defaults = {"c2i": (4.0, 2000, 384), "t2i": (7.5, 1000, 512)}
    cfg_scale, top_k, image_size = defaults[gpt_type]
    flags.add_argument("--class-names", help="JSON list of class names; ImageNet's are known")
    add_text_args(flags)
    add_model_args(flags, cfg_scale, top_k, gpt_type, image_size)


def card_of_args(args: argparse.Namespace) -> Card:
    """The card of the model that a command's flags describe."""
    return Card(f"{args.gpt_model}-{checkpoint_tag(args.gpt_ckpt)}".lower(), args)


def read_card(path: str | Path, overrides: Sequence[str] = ()) -> Card:
    """A card from a JSON file ``{"name", "about", "examples", "flags": {flag: value}}``.

    Files are named relative to it. `overrides` are further flags, such as ``--device cpu``.

    Raises:
        ValueError: a file of another form.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or not {"name", "flags"} <= content.keys():
        raise ValueError(f'{path} is not the card of a model: expected {{"name": ..., "flags": {{...}}}}')
    values = {f: str(path.parent / v) if f in _PATHS else str(v) for f, v in content["flags"].items()}
    gpt_type = values.get("gpt-type", "c2i")
    args = card_parser(gpt_type).parse_args([*(f"--{flag}={value}" for flag, value in values.items()), *overrides])
    return Card(content["name"], args, content.get("about", ""), tuple(content.get("examples", ())))


def bundled_cards(overrides: Sequence[str] = ()) -> list[Card]:
    """The models that come with the project: small ones, of emoji, by class and by text."""
    return [read_card(EMOJI / f"{name}.json", overrides) for name in ("emoji-class", "emoji-text")]


def cards_of_flags(flags: Sequence[str], files: Sequence[str] = ()) -> list[Card]:
    """What a command serves: the models of `files`, or the one that its model flags describe, or the bundled ones.

    `flags` are the words of the command line that describe a model; with files or the bundled models they override
    what is said there, such as ``--device cpu``.
    """
    kind = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    kind.add_argument("--gpt-type", default="c2i")
    kind.add_argument("--gpt-ckpt")
    known, _ = kind.parse_known_args(flags)
    if files:
        return [read_card(file, flags) for file in files]
    if known.gpt_ckpt is None:
        return bundled_cards(flags)
    return [card_of_args(card_parser("t2i" if known.gpt_type == "t2i" else "c2i").parse_args(flags))]
