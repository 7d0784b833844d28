"""Files that are whole or not there: write beside the target, then rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_NO_SPACE = 2**16  # bytes


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it becomes `path` if the block ends well, else it is removed.

    Raises:
        ValueError: when the disk is full; a file that stood at `path` before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        full = is_full_disk(error, path.parent)
        temporary.unlink(missing_ok=True)
        if full:
            raise ValueError(f"no space left on the disk while writing {path}; nothing there was changed") from error
        raise


def is_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether a write below `folder` failed with `error` because no space is left."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if "No space left on device" in str(error):  # safetensors' own class of errors
        return True
    # torch's zip writer reports a full disk as a RuntimeError without an errno
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _NO_SPACE


def write_atomic(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a binary file that then takes the place of `path` at once."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        write(file)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=False, default=str) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: when the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where downloads and expensive results are kept: $LLAMAGEN_CACHE, else ``llamagen`` in the user's cache folder."""
    if "LLAMAGEN_CACHE" in os.environ:
        return Path(os.environ["LLAMAGEN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llamagen"
