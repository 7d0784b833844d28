"""What people keep their images in: folders, tables and tar shards, all listed as entries with one way to load them."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.images import class_list, is_image_name
from dataset.lists import TABLE_SUFFIXES, ParquetColumn, read_table
from dataset.tar_members import member_kind, members_of
from dataset.tars import list_tars
from utils.files import read_json

COLUMNS = {  # what columns are usually called, best guess first
    "path": ("image_path", "path", "file_name", "filename", "filepath", "file", "image", "img"),
    "caption": ("caption", "text", "captions", "prompt", "description", "title"),
    "label": ("label", "class", "class_name", "category", "cls"),
}


@dataclass
class Entry:
    """One image of the source: a relative name, where it is, and what is said about it."""

    name: str
    load: Callable[[], bytes]
    file: Path | None = None
    label: str = ""
    captions: list[str] = field(default_factory=list)


def list_entries(source: str | Path, captions: str | Path | None, columns: dict[str, str | None]) -> list[Entry]:
    """Everything `source` (and the table `captions`) holds.

    Raises:
        FileNotFoundError: when the source is missing.
        ValueError: when it holds no images, or a column is missing.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}; give a folder of images, a table or tar shards as --source")
    if source.suffix.lower() in TABLE_SUFFIXES and source.is_file():
        entries = _table_entries(source, columns)
    elif source.is_file() or (list(source.glob("*.tar")) and not any(image_files(source))):
        entries = _tar_entries(source)
    else:
        entries = _folder_entries(source, captions, columns)
    if not entries:
        raise ValueError(f"there are no images in {source}")
    return entries


def image_files(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(path))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(path, name)) not in visited
        )
        yield from (Path(path, name) for name in sorted(files) if is_image_name(name))


def _folder_entries(folder: Path, captions: str | Path | None, columns: dict[str, str | None]) -> list[Entry]:
    entries = {}
    for file in image_files(folder):
        name = file.relative_to(folder)
        note = file.with_suffix(".txt")
        text = note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else ""
        label = name.parts[0] if len(name.parts) > 1 else ""
        entries[name.as_posix()] = Entry(name.as_posix(), file.read_bytes, file, label, [text] if text else [])
    table = Path(captions) if captions else _table_in(folder)
    if table:
        _add_table(entries, table, columns)
    return list(entries.values())


def _table_in(folder: Path) -> Path | None:
    names = [f"{stem}{suffix}" for stem in ("metadata", "captions") for suffix in TABLE_SUFFIXES]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _add_table(entries: dict[str, Entry], table: Path, columns: dict[str, str | None]) -> None:
    found = 0
    for path, captions, label in _rows(table, columns):
        entry = entries.get(Path(str(path)).as_posix())
        if entry is not None:
            found += 1
            entry.captions += captions
            entry.label = label or entry.label
    if not found:
        raise ValueError(f"no row of {table} names an image of the folder, such as {next(iter(entries), 'a.png')!r}")


def _rows(table: Path, columns: dict[str, str | None]) -> Iterator[tuple[Any, list[str], str]]:
    """Image, captions and label of each row."""
    names: dict[str, str | None] | None = None
    for row in read_table(table):
        names = names or {role: _column(table, role, columns.get(role), list(row)) for role in COLUMNS}
        captions, label = (row.get(names[role]) if names[role] else None for role in ("caption", "label"))
        texts = captions if isinstance(captions, (list, tuple)) else [captions]
        yield (
            row.get(names["path"]),
            [str(t) for t in texts if t not in (None, "")],
            "" if label is None else str(label),
        )


def _column(table: Path, role: str, wanted: str | None, found: list[str]) -> str | None:
    if wanted is not None:
        if wanted not in found:
            raise ValueError(f"{table} has no column {wanted!r}; its columns are {', '.join(found)}")
        return wanted
    guess = next((name for name in COLUMNS[role] if name in found), None)
    if guess is None and role == "path":
        raise ValueError(f"{table} has the columns {', '.join(found)}; say with --path-column which names the image")
    return guess


def _table_entries(table: Path, columns: dict[str, str | None]) -> list[Entry]:
    entries: dict[str, Entry] = {}
    cells: ParquetColumn | None = None
    for number, (image, captions, label) in enumerate(_rows(table, columns)):
        if isinstance(image, dict):  # a parquet column of images: bytes, or the path in place of them
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            cells = cells or ParquetColumn(table, _column(table, "path", columns.get("path"), _header(table)))
            entry = Entry(f"{number:09d}", lambda cells=cells, row=number: _image_bytes(cells[row]))
        else:
            entry = _file_entry(table.parent, str(image or f"(row {number} without an image)"))
        entry = entries.setdefault(entry.name, entry)
        entry.captions += captions
        entry.label = label or entry.label
    return list(entries.values())


def _header(table: Path) -> list[str]:
    return list(next(read_table(table)))


def _image_bytes(cell: Any) -> bytes:
    return cell["bytes"] if isinstance(cell, dict) else cell


def _file_entry(folder: Path, path: str) -> Entry:
    file = folder / path
    name = Path(os.path.normpath(path))
    if name.is_absolute() or ".." in name.parts:  # two folders may have files of one name
        name = Path(f"{hashlib.sha256(os.fsencode(file.parent)).hexdigest()[:8]}-{name.name}")
    return Entry(name.as_posix(), file.read_bytes, file)


def _tar_entries(source: Path) -> list[Entry]:
    shards = list_tars(source)
    names = class_list(source if source.is_dir() else source.parent) or _shard_classes(shards[0].parent)
    return [entry for shard in shards for entry in _one_tar(shard, names)]


def _shard_classes(folder: Path) -> list[str]:
    manifest = read_json(folder / "shards.json") if (folder / "shards.json").is_file() else {}
    return manifest.get("classes") or []


def _one_tar(shard: Path, classes: Sequence[str]) -> list[Entry]:
    entries: dict[str, Entry] = {}
    damage: list[str] = []
    with tarfile.open(shard, "r:") as archive:
        for info in members_of(archive, shard, damage.append):
            folder, _, base = info.name.rpartition("/")
            key, _, member = base.partition(".")
            name = f"{shard.stem}/{folder}/{key}".replace("//", "/")
            entry = entries.setdefault(name, Entry(name, bytes))
            kind = member_kind(member)
            if kind == "image":
                entry.load = lambda place=info.offset_data, size=info.size: _piece(shard, place, size)
            elif kind in ("txt", "cls", "json"):
                _add_member(entry, kind, _piece(shard, info.offset_data, info.size), classes)
    if damage:
        entries[str(shard)] = Entry(f"{shard.stem}: {damage[0]}", bytes)
    return list(entries.values())


def _piece(path: Path, place: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(place)
        return file.read(size)


def _add_member(entry: Entry, kind: str, data: bytes, classes: Sequence[str]) -> None:
    text = data.decode("utf-8", "replace").strip()
    if kind == "txt" and not entry.captions:
        entry.captions = [text] if text else []
    elif kind == "cls" and not entry.label:
        number = int(text) if text.isdecimal() else -1
        entry.label = classes[number] if 0 <= number < len(classes) else text
    elif kind == "json":
        try:
            value = json.loads(text)
        except ValueError:
            return
        if isinstance(value, dict):
            captions = value.get("text") or value.get("caption") or []
            entry.captions = [str(t) for t in ([captions] if isinstance(captions, str) else captions)] or entry.captions
            entry.label = str(value.get("label") or entry.label)
