"""Filling a packed code store (see dataset/packed.py): shards are written whole, the manifest last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.packed import COMPANIONS, FORMAT, MANIFEST, RECORD, code_dtype, fault_of, note_name, sha256_of
from utils.claim import agrees
from utils.files import read_json, write_atomic, write_json

SHARD_SIZE = 4096
_FEWEST_SHARDS = 16
_INFORMATION = ("classes", "data_path")  # may change between two starts of one extraction


def shard_rows(images: int, shard_size: int) -> list[range]:
    """The rows of each shard: `shard_size` of them, fewer in a small set, so that an interruption costs little."""
    size = max(min(shard_size, math.ceil(images / _FEWEST_SHARDS)), 1)
    return [range(first, min(first + size, images)) for first in range(0, images, size)]


class PackedWriter:
    """Fills a store, shard by shard; several processes may fill different shards at the same time.

    Args:
        folder: the store.
        kind: "class" or "caption".
        images: number of rows, unreadable images included.
        views, tokens: A and T.
        codebook_size: entries of the tokenizer's codebook; None when it is not known.
        settings: how the codes are made; a store is only continued with equal settings.
        shard_size: rows in a shard, at most.

    Raises:
        ValueError: when `folder` holds codes that were made with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        *,
        images: int,
        views: int,
        tokens: int,
        codebook_size: int | None,
        settings: Mapping[str, Any],
        shard_size: int = SHARD_SIZE,
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"a shard must have at least one image, found a shard size of {shard_size}")
        self.folder, self.companion = Path(folder), COMPANIONS[kind]
        self.shards, self.shape = shard_rows(images, shard_size), (views, tokens)
        self.dtype, self.codebook_size = code_dtype(codebook_size or 2**16), codebook_size
        self.record = {
            "format": FORMAT, "kind": kind, "images": images, "shards": len(self.shards), "dtype": str(self.dtype),
            "views": views, "tokens": tokens, "grid": math.isqrt(tokens), "codebook_size": codebook_size, **settings,
        }  # fmt: skip
        agrees(self.folder / RECORD, self.record, f"{self.folder} holds codes", "one", _INFORMATION)

    def claim(self) -> None:
        """Note in the folder how its codes are made; one process does this before any writes."""
        write_json(self.folder / RECORD, self.record)

    def has(self, shard: int) -> bool:
        """True when shard number `shard` is complete and its checksums are right."""
        note = self.folder / note_name(shard)
        return note.is_file() and fault_of(self.folder, read_json(note)) is None

    def write(self, shard: int, codes: np.ndarray, companion: np.ndarray, missing: Sequence[int] = ()) -> None:
        """Write one shard: `codes` (n, A, T), `companion` (n,) or (n, 2), and the rows without codes.

        Raises:
            ValueError: when a shape is wrong or a code lies outside the codebook.
        """
        rows = self.shards[shard]
        if codes.shape != (len(rows), *self.shape) or len(companion) != len(rows):
            raise ValueError(
                f"shard {shard} of {self.folder} needs codes of the shape {(len(rows), *self.shape)} and as many "
                f"{self.companion}, found {codes.shape} and {len(companion)}"
            )
        limit = self.codebook_size or 2**16
        if codes.min() < 0 or codes.max() >= limit:
            raise ValueError(f"codes must lie between 0 and {limit - 1}, found {codes.min()} to {codes.max()}")
        note: dict[str, Any] = {"first": rows.start, "count": len(rows), "missing": sorted(missing), "files": {}}
        parts = {"codes": codes.astype(self.dtype), self.companion: companion.astype(np.int64)}
        for part, array in parts.items():
            path = self.folder / f"{part}-{shard:05d}.npy"
            write_atomic(path, lambda file, array=array: np.save(file, array, allow_pickle=False))
            note["files"][part] = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_json(self.folder / note_name(shard), note)

    def finish(self) -> dict[str, Any]:
        """Write the manifest, which says that the store is complete, and return it.

        Raises:
            ValueError: when a shard is missing.
        """
        absent = [shard for shard in range(len(self.shards)) if not (self.folder / note_name(shard)).is_file()]
        if absent:
            raise ValueError(f"{self.folder} lacks {len(absent)} of {len(self.shards)} shards, the first {absent[0]}")
        notes = [read_json(self.folder / note_name(shard)) for shard in range(len(self.shards))]
        missing = [row for note in notes for row in note["missing"]]
        manifest = {**self.record, "missing": missing, "shards": notes}
        write_json(self.folder / MANIFEST, manifest)
        return manifest
