"""What stands in a tar shard: members, their bytes and their meaning; damaged tars end, they do not mislead.

Nothing is ever unpickled: of what a foreign tar may hold, images, text, numbers, JSON and plain arrays are decoded.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
MAX_MEMBER = 2**28  # bytes; a larger one is no image, caption or code
Report = Callable[[str], None]


class BadSample(ValueError):
    """A sample that lacks a member or holds one that cannot be decoded."""


# ---- one member


def member_kind(member: str) -> str | None:
    """What a member called `member` holds: image, txt, cls, json or npy; None for anything else."""
    suffix = member.lower().rpartition(".")[2]
    return "image" if suffix in IMAGE_FORMATS else suffix if suffix in ("txt", "cls", "json", "npy") else None


def encode_member(member: str, value: Any) -> bytes:
    """The bytes of a member: images are bytes already, txt is str, cls int, json JSON, npy an array.

    Raises:
        ValueError: when the name says nothing about the contents.
    """
    kind = member_kind(member)
    if kind is None:
        raise ValueError(f"a member called {member!r} is unknown; use .png, .jpg, .webp, .txt, .cls, .json or .npy")
    if isinstance(value, bytes):
        return value
    if kind == "npy":
        stream = io.BytesIO()
        np.save(stream, np.asarray(value), allow_pickle=False)
        return stream.getvalue()
    text = json.dumps(value, ensure_ascii=False) if kind == "json" else str(value)
    return text.encode("utf-8", "surrogatepass")


def decode_member(member: str, data: bytes) -> Any:
    """The inverse of `encode_member`: an RGB PIL image, str, int, JSON or a tensor (integers as int64).

    Raises:
        BadSample: when the bytes are something else.
    """
    decode = {"image": decode_image, "txt": bytes.decode, "cls": int, "json": json.loads, "npy": _decode_array}
    try:
        return decode[member_kind(member)](data)
    except Exception as error:  # each decoder has exceptions of its own
        raise BadSample(f"the member {member} cannot be decoded ({type(error).__name__}: {error})") from error


def decode_image(data: bytes) -> Image.Image:
    """Decode PNG, JPEG or WebP to RGB; anything Pillow raises is passed on."""
    with Image.open(io.BytesIO(data), formats=sorted(set(IMAGE_FORMATS.values()))) as image:
        return image.convert("RGB")


def _decode_array(data: bytes) -> torch.Tensor:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise ValueError("expected one array of numbers")
    return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else array.dtype.newbyteorder("=")))


# ---- one tar


def members_of(archive: tarfile.TarFile, path: Path, report: Report) -> Iterator[tarfile.TarInfo]:
    """The ordinary files in a tar of which something can be read; `report` hears of damage.

    Links, devices and sparse files, which are larger than their tar, are passed over.
    """
    while True:
        try:
            info = archive.next()
        except (tarfile.TarError, OSError, EOFError, ValueError, MemoryError) as error:
            report(f"{path} is cut short or damaged ({error})")
            return
        if info is None:
            return
        archive.members = []  # else it keeps every header
        if info.size > MAX_MEMBER:
            report(f"{path}: {info.name} is said to have {info.size} bytes, more than {MAX_MEMBER}")
            return  # skipping it would count up to its size
        if info.isreg() and not info.issparse():
            yield info


def read_tar(path: str | Path, report: Report) -> Iterator[dict[str, Any]]:
    """The samples of a tar: member name -> bytes, and "__key__"; `report` hears of damage, which ends it."""
    from webdataset.tariterators import group_by_keys  # here: see tars.py

    path = Path(path)
    for sample in group_by_keys(_files(path, report), handler=lambda error: report(str(error.args[0])) is None):
        del sample["__url__"]
        yield sample


def _files(path: Path, report: Report) -> Iterator[dict[str, Any]]:
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for info in members_of(archive, path, report):
                yield {"fname": info.name, "data": archive.extractfile(info).read(), "__url__": str(path)}
    except (tarfile.TarError, OSError) as error:
        report(f"{path} is cut short or damaged ({error})")
    else:
        if not _has_end_mark(path):
            report(f"{path} has no end mark: it was cut short")


def _has_end_mark(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read() == bytes(1024)
