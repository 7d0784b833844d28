"""Lists of images and captions: folders of .jsonl files, one JSON object per line.

Each object has at least `image_path`; captions sit in the list `text` (blip, llava, llava_first). A record is
known by its list's stem (the file name without .jsonl) and its 0-based line number; text features and codes
derived from it are stored as `{stem}/{line}.npy`.

`read_table` reads the tables in which other people keep such things.
"""

from __future__ import annotations

import csv
import json
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
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


def read_table(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a .csv, .tsv, .jsonl or .parquet file (the last needs the package pyarrow), column -> value.

    Raises:
        ValueError: when the file is of another kind or damaged, or pyarrow is missing.
    """
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    path = Path(path)
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is no table; expected {', '.join(TABLE_SUFFIXES)}")
    try:
        yield from readers[path.suffix.lower()](path)
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a {path.suffix[1:]} table in UTF-8: {error}") from error


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**24)  # captions may be long
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if "," not in header and ";" in header else ","
        for row in csv.DictReader(file, delimiter=delimiter):
            if None in row or None in row.values():
                raise ValueError(f"{path}: the row {list(row.values())} does not have as many fields as the header")
            yield row


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{path} line {number}: expected a JSON object")
                yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import_parquet(path)
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as a parquet table: {error}") from error


def import_parquet(path: Path) -> None:
    """Raise ValueError with the pip command to run when pyarrow is missing."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ValueError(f"reading {path} needs a package that is not installed: pip install pyarrow") from error


class ParquetColumn:
    """One column of a .parquet file by row number, for columns too large to keep; threads may share it."""

    def __init__(self, path: Path, column: str) -> None:
        from pyarrow.parquet import ParquetFile

        self.column, self._file, self._lock = column, ParquetFile(path), threading.Lock()
        groups = self._file.metadata
        self._ends = np.cumsum([groups.row_group(number).num_rows for number in range(groups.num_row_groups)])
        self._group, self._cells = -1, None

    def __getitem__(self, row: int) -> Any:
        group = int(np.searchsorted(self._ends, row, side="right"))
        with self._lock:  # rows are asked for in order, so one row group in memory is enough
            if group != self._group:
                self._group, self._cells = group, self._file.read_row_group(group, columns=[self.column])[self.column]
            cells = self._cells
        return cells[row - int(self._ends[group]) + len(cells)].as_py()
