"""Prompts for text-to-image sampling: from a plain text file, or a column of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataset.lists import read_table

COLUMNS = ("Prompt", "prompt", "caption", "text")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in its order.

    .txt holds one a line (blank lines are left out). Tables have a header with a column Prompt, prompt, caption or
    text: tab-separated whatever the name says when the header has a tab or no comma (the established PartiPrompts.tsv
    and coco_captions.csv), else .csv, .jsonl (caption lists too) or .parquet. In tab-separated files a quotation mark
    is a quotation mark, unless it encloses a whole field.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it has no such column, or no prompts, or is not text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file of prompts {path}; expected .txt with one a line, or a table with a column "
            f"{' or '.join(COLUMNS[:2])} (the lists of PartiPrompts and COCO captions are not part of this project)"
        )
    prompts = _plain(path) if path.suffix == ".txt" else _column(path)
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts


def _plain(path: Path) -> list[str]:
    return [line.strip() for line in _lines(path) if line.strip()]


def _lines(path: Path) -> list[str]:
    try:
        # split at line feeds alone: a caption may hold one of the other signs that splitlines takes for a line's end
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def _column(path: Path) -> list[str]:
    if path.suffix.lower() in (".csv", ".tsv"):
        header, *lines = _lines(path)
        if "\t" in header or not {",", ";"} & set(header):
            names = [_unquoted(name) for name in header.split("\t")]
            place = names.index(_prompt_column(path, names))
            rows = [[_unquoted(field) for field in line.split("\t")] for line in lines if line.strip()]
            return [row[place] if place < len(row) else "" for row in rows]
    rows = list(read_table(path))
    name = _prompt_column(path, list(rows[0]) if rows else [])
    return [_first(row.get(name, "")) for row in rows]


def _first(cell: Any) -> str:
    """A caption; the first of several, as caption lists have them."""
    return str((cell or [""])[0] if isinstance(cell, list) else cell)


def _prompt_column(path: Path, names: list[str]) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise ValueError(f"{path} has the columns {names}; expected one of {', '.join(COLUMNS)}")


def _unquoted(field: str) -> str:
    """A field without the quotation marks around it, if they are there for the format's sake."""
    field = field.strip()
    inner = field[1:-1]
    if len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return field
