"""What can be served: a model's name, what it draws, and the flags that load it. Nothing is loaded here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
SAMPLING = ("cfg_scale", "top_k", "top_p", "temperature")  # what a request can set
_OF_ANY_MODEL = (
    *SAMPLING, "cfg_interval", "cfg_start", "cfg_schedule", "cfg_power", "min_p", "temperature_end",
    "temperature_schedule", "device", "num_threads", "engine", "compile", "quantize", "kv_cache_dtype",
    "precision", "decode_precision",
)  # fmt: skip
_PATHS = ("gpt-ckpt", "vq-ckpt", "class-names")  # flags that name files
_UNSET: Any = object()


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
        return {name: getattr(self.args, name) for name in SAMPLING}


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


def read_card(path: str | Path) -> Card:
    """A card from a JSON file ``{"name", "about", "examples", "flags": {flag: value}}``; files are relative to it.

    Raises:
        ValueError: a file of another form.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or not {"name", "flags"} <= content.keys():
        raise ValueError(f'{path} is not the card of a model: expected {{"name": ..., "flags": {{...}}}}')
    values = {f: str(path.parent / v) if f in _PATHS else str(v) for f, v in content["flags"].items()}
    parser = card_parser(values.get("gpt-type", "c2i"))
    args = parser.parse_args([f"--{flag}={value}" for flag, value in values.items()])
    return Card(content["name"], args, content.get("about", ""), tuple(content.get("examples", ())))


def bundled_cards() -> list[Card]:
    """The models that come with the project: small ones, of emoji, by class and by text."""
    return [read_card(EMOJI / f"{name}.json") for name in ("emoji-class", "emoji-text")]


def given_flags(flags: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The values of the flags that somebody typed, without the defaults of the others."""
    names = [action.dest for action in flags._actions if action.default is not None]
    typed = vars(flags.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, _UNSET))))
    return {name: value for name, value in typed.items() if value is not _UNSET and value is not None}


def cards_of(
    given: Mapping[str, Any], files: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> list[Card]:
    """What a command draws with: the model that its flags describe, or those of the card `files`, or the bundled ones.

    `given` are the flags of a model that were typed, by their names; what says how to draw goes for any model.
    `defaults` take the place of the samplers' for a described one.

    Raises:
        ValueError: one of the two checkpoints is missing, there are flags of a model and no checkpoint at all, or both
            a model and files.
    """
    missing = [name for name in ("vq_ckpt", "gpt_ckpt") if not given.get(name)]
    if not missing:
        if files:
            raise ValueError("give --card, or --vq-ckpt and --gpt-ckpt, not both")
        args = card_parser(given.get("gpt_type", "c2i")).parse_args([])
        return [card_of_args(argparse.Namespace(**{**vars(args), **(defaults or {}), **given}))]
    if len(missing) == 1:
        raise ValueError(f"--{missing[0].replace('_', '-')} is missing: a model is a tokenizer and a GPT, give both")
    useless = [name for name in given if name not in _OF_ANY_MODEL]
    if useless:
        raise ValueError(
            f"--{useless[0].replace('_', '-')} describes a model, but there is none: give --vq-ckpt and --gpt-ckpt as "
            f"well, or no flag of a model for those that come with the project"
        )
    return [with_values(card, given) for card in (map(read_card, files) if files else bundled_cards())]


def with_values(card: Card, values: Mapping[str, Any]) -> Card:
    """The card with other values of some flags."""
    return replace(card, args=argparse.Namespace(**{**vars(card.args), **values}))
