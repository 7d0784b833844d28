"""Lists of images and captions: folders of .jsonl files, one JSON object per line.

Each object has at least `image_path`; captions sit in the list `text` (blip, llava, llava_first). A record is
known by its list's stem (the file name without .jsonl) and its 0-based line number; text features and codes
derived from it are stored as `{stem}/{line}.npy`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CAPTION_KEYS = {"blip": 0, "llava": 1, "llava_first": 2}


@dataclass(frozen=True)
class Record:
    """One line of a list. `image_path` is as written there; `list_file` is where it stands."""

    image_path: str
    stem: str
    line: int
    text: Sequence[str]
    list_file: Path

    @property
    def image_file(self) -> Path:
        """Where the image is: `image_path` as it stands, or else relative to the folder of the list."""
        path = Path(self.image_path)
        return path if path.is_absolute() or path.exists() else self.list_file.parent / path

    def caption(self, key: str = "blip", truncated: bool = False) -> str:
        """The caption called `key`; `truncated` keeps what precedes the first full stop.

        Raises:
            ValueError: when the line has no such caption.
        """
        place = CAPTION_KEYS[key]
        if not isinstance(self.text, list) or len(self.text) <= place:
            raise ValueError(f"{self.list_file} line {self.line}: 'text' has no entry {place} (caption key {key})")
        caption = str(self.text[place])
        return caption.split(".")[0] if truncated else caption


def list_files(
    folder: str | Path, start: int | None = None, end: int | None = None, suffix: str = ".jsonl"
) -> list[Path]:
    """The list files in `folder` whose names end in `suffix`, sorted.

    `start` and `end` (included) cut a piece out of the sorted listing, where other files count as well.

    Raises:
        FileNotFoundError: when the folder is missing.
        ValueError: when no list remains.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected one with {suffix} lists in it")
    listing = sorted(Path(folder).iterdir())[start : None if end is None else end + 1]
    files = [path for path in listing if path.name.endswith(suffix) and path.is_file()]
    if not files:
        piece = "" if start is end is None else f" at places {start} to {end} of the sorted listing"
        raise ValueError(f"no {suffix} lists in {folder}{piece}")
    return files


class CaptionLists(Sequence[Record]):
    """The records of several lists, one after another; blank lines are left out.

    Only the position of each line is kept in memory (16 bytes); lines are read and parsed when asked for.

    Raises:
        ValueError: when two lists have the same stem, or all are empty.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.stems = [path.name.removesuffix(".jsonl") for path in self.files]
        self._require_distinct_stems()
        tables = [_line_table(path) for path in self.files]
        self._table = np.concatenate(tables) if tables else np.zeros((0, 2), np.int64)
        self._ends = np.cumsum([len(table) for table in tables])
        if not len(self):
            raise ValueError(f"no records in {', '.join(str(path) for path in self.files)}")

    def _require_distinct_stems(self) -> None:
        first: dict[str, Path] = {}
        for stem, path in zip(self.stems, self.files):
            if stem in first:
                raise ValueError(f"{first[stem]} and {path} would share the features and codes of {stem!r}; rename one")
            first[stem] = path

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        """Record `index`.

        Raises:
            ValueError: when the line is not a JSON object with an `image_path`.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(np.searchsorted(self._ends, index, side="right"))
        line, offset = (int(number) for number in self._table[index])
        return _parse(self.files[place], self.stems[place], line, offset)


def _line_table(path: Path) -> np.ndarray:
    """Number and byte offset of each line that is not blank, (lines, 2) int64."""
    table, offset = array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                table.extend((number, offset))
            offset += len(line)
    return np.frombuffer(table, np.int64).reshape(-1, 2) if table else np.zeros((0, 2), np.int64)


def _parse(path: Path, stem: str, line: int, offset: int) -> Record:
    with open(path, "rb") as file:
        file.seek(offset)
        text = file.readline()
    try:
        entry = json.loads(text)
        return Record(str(entry["image_path"]), stem, line, entry.get("text", []), path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} line {line}: expected a JSON object with 'image_path'") from error
