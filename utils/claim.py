"""A note of how results were made, so that those of other settings never mix with them."""

from __future__ import annotations

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
        known = read_json(record) if record.is_file() else None
        changed = [n for n in settings if n not in unchecked and known is not None and known.get(n) != settings[n]]
        if changed:
            problem = (
                f"{record.parent} holds {what} made with another {changed[0]} ({known.get(changed[0])}, now "
                f"{settings[changed[0]]}); remove the folder or give another {flag}"
            )
        elif known is None:
            write_json(record, dict(settings))
    problem = broadcast_object(problem)
    if problem:
        raise ValueError(problem)
