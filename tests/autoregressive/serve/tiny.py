"""Cards of random models of a few weights: "tiny-class" draws three classes, "tiny-text" texts; 4 x 4 codes, 16 px."""

from __future__ import annotations

import json
from pathlib import Path

from autoregressive.serve.cards import Card, read_card
from tests.autoregressive.sample.tiny import tiny_models, tiny_text_models

NAMES = ["red circle", "blue square", "green star"]


def tiny_cards(work: Path) -> list[Card]:
    """Write the models and their cards into `work` and read them."""
    return [read_card(path) for path in tiny_card_files(work)]


def tiny_card_files(work: Path) -> list[Path]:
    """The same, as the files of the cards."""
    files = []
    for name, make in (("tiny-class", tiny_models), ("tiny-text", tiny_text_models)):
        folder = work / name
        folder.mkdir()
        flags = [str(flag) for flag in make(folder)]
        values = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2])}
        values |= {key: Path(values[key]).name for key in ("gpt-ckpt", "vq-ckpt")}
        values |= {"engine": "eager", "top-k": 0}
        if name == "tiny-class":
            (folder / "classes.json").write_text(json.dumps(NAMES))
            values["class-names"] = "classes.json"
        else:
            values["gpt-type"] = "t2i"
        files.append(folder / "card.json")
        files[-1].write_text(json.dumps({"name": name, "about": "random weights", "flags": values}))
    return files
