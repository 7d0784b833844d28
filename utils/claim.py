"""A note of how results were made, so that those of other settings never mix with them."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from utils.distributed import broadcast_object, is_main
from utils.files import read_json, write_json


def claim(record: Path, settings: Mapping[str, Any], what: str, flag: str, unchecked: Collection[str] = ()) -> None:
    """Write `settings` to the JSON file `record`, or compare with what it says; every process calls this.

    Raises:
        ValueError: on all processes, when `record` has another value for one of `settings` (but for `unchecked`).
    """
    problem = None
    if is_main():
        try:
            if not agrees(record, settings, f"{record.parent} holds {what}", flag, unchecked):
                write_json(record, dict(settings))
        except ValueError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise ValueError(problem)


def claim_folder(
    folder: Path, record: Path, settings: Mapping[str, Any], what: str, unchecked: Collection[str] = ()
) -> None:
    """The same for a folder that holds nothing but `what`; one process calls this, before it writes there.

    `record` lies in the folder or beside it. While the folder has no other file, a record says nothing.

    Raises:
        ValueError: when the folder has files without a record, or with one of other settings.
    """
    if (folder.is_dir() and all(path == record for path in folder.iterdir())) or not folder.exists():
        write_json(record, dict(settings))
    elif not agrees(record, settings, f"{folder} holds {what}", "one", unchecked):
        raise ValueError(
            f"{folder} has files, but {record.name} is missing, so nobody knows how they were made; move them away or "
            f"give another folder"
        )


def agrees(record: Path, settings: Mapping[str, Any], held: str, flag: str, unchecked: Collection[str] = ()) -> bool:
    """Whether the JSON file `record` is there; then it holds `settings`, and nothing else but `unchecked`.

    Raises:
        ValueError: when it holds other settings: `held` ("FOLDER holds codes") made otherwise, give another `flag`.
    """
    if not record.is_file():
        return False
    content = read_json(record)
    known = content if isinstance(content, dict) else {}
    names = [*settings, *(name for name in known if name not in settings)]
    changed = [name for name in names if name not in unchecked and known.get(name) != settings.get(name)]
    if changed:
        others = " and ".join(f"{n} ({_short(known.get(n))}, now {_short(settings.get(n))})" for n in changed)
        raise ValueError(f"{held} made with another {others}; remove the folder or give another {flag}")
    return True


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), 80, placeholder=" ...")
