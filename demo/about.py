"""What the page says of models, and the line that draws the same pictures without it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from html import escape
from pathlib import Path
from typing import Any

import torch

from autoregressive.build import build_gpt
from autoregressive.sample import edit_c2i, sample_c2i, sample_t2i
from autoregressive.serve.cards import Card
from autoregressive.serve.requests import Request
from tokenizer.build import build_tokenizer

_ROOT = Path(__file__).resolve().parents[1]
_USUAL_CODES = 16384
_FILES = ("gpt_ckpt", "vq_ckpt", "class_names")


def is_local(card: Card) -> bool:
    """Whether the model's files are known here; those of a server's models are not."""
    return bool(getattr(card.args, "gpt_ckpt", None))


def codes_of(card: Card) -> int:
    """How many different codes the model has; of a model on a server, whose flags are not known, the usual number."""
    if not getattr(card.args, "vq_ckpt", None):
        return _USUAL_CODES
    with torch.device("meta"):
        return build_tokenizer(card.args).config.codebook_size


def parameters(card: Card) -> int:
    """How many numbers the GPT has; 0 where its flags are not known."""
    if not is_local(card):
        return 0
    with torch.device("meta"):
        return sum(weight.numel() for weight in build_gpt(card.args, codes_of(card)).parameters())


def in_words(count: int) -> str:
    """A number of parameters as people write it: 775M, 1.4B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.{0 if count >= 100 * size or unit == 'K' else 1}f}{unit}"
    return str(count)


def model_html(card: Card) -> str:
    """One line of HTML: a model, what it draws, how large it is."""
    facts = [f"<strong>{escape(card.name)}</strong>"]
    if is_local(card):
        facts.append(f"{escape(card.args.gpt_model)}, {in_words(parameters(card))} parameters")
    what = f"{card.classes.num_classes:,} classes" if card.classes else "any text"
    facts.append(f"draws {what} as {card.edge} × {card.edge} pixels of {card.grid} × {card.grid} codes")
    about = f'<span class="about">{escape(card.about)}</span>' if card.about else ""
    return " · ".join(facts) + about


def again(request: Request, card: Card) -> str:
    """What draws the same pictures: the command line, or for a model on a server the body of a request to it."""
    return command_line(request, card) if is_local(card) else server_body(request, card)


def command_line(request: Request, card: Card) -> str:
    """The sampler's line, to be run in the repository's folder."""
    name, command = ("edit_c2i", edit_c2i) if request.edit else _SAMPLERS[card.kind]
    if request.edit and card.classes is None:
        return ""  # there is no command that edits by a text
    flags: dict[str, Any] = {
        **vars(card.args),
        **vars(request.sampling),
        "seed": request.seed,
        "images_per_class" if card.classes else "images_per_prompt": request.n,
        "class_labels" if card.classes else "prompts": [str(request.subject)],
    }
    if request.edit:
        flags |= {"input": "PICTURE.png", "cells": request.edit.mask.nonzero()[0].tolist()}
    line = ["python3", f"autoregressive/sample/{name}.py", *_flag_words(command.parser(), flags)]
    return shlex.join(line)


_SAMPLERS = {"c2i": ("sample_c2i", sample_c2i), "t2i": ("sample_t2i", sample_t2i)}


def _flag_words(parser: argparse.ArgumentParser, values: dict[str, Any]) -> list[str]:
    """The flags that are not the parser's defaults, as words."""
    words: list[str] = []
    for action in parser._actions:
        value = values.get(action.dest)
        if action.dest not in values or value is None or value == action.default or value == []:
            continue
        flag = action.option_strings[0]
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, _nearby(value) if action.dest in _FILES else str(value)]
    return words


def _nearby(path: str) -> str:
    """A path as it is typed in the repository's folder."""
    full = os.path.abspath(path)
    return os.path.relpath(full, _ROOT) if Path(full).is_relative_to(_ROOT) else full


def server_body(request: Request, card: Card) -> str:
    """The JSON for ``POST /v1/images/generations``; of an edit nothing, as its picture is not in it."""
    if request.edit:
        return ""
    what = {"prompt": request.subject} if card.classes is None else {"class": request.subject}
    body = {"model": card.name, **what, "n": request.n, "seed": request.seed, **vars(request.sampling)}
    return json.dumps(body, ensure_ascii=False)
