"""Text features of caption lists, in one of two layouts that `open_features` tells apart.

One file per caption, the established layout:

    {path}/{list stem}/{line}.npy      float (1, n, dim), n tokens

Packed, half the bytes and a few large files:

    {path}/features.json               counts, dim, encoder, lists and the checksums of the shards
    {path}/{shard}.features.npy        uint16 (sum of n, dim): the bits of bfloat16, captions one after another
    {path}/{shard}.offsets.npy         int64 (captions + 1,): caption i has the rows offsets[i] to offsets[i + 1]
    {path}/{shard}.keys.npy            int64 (captions,), ascending: number of the list * 2^40 + line

Shards are memory-mapped: any number of processes share one copy and nothing is read that is not asked for. A shard's
entry, `{shard}.json`, is written after its arrays, so that it says that the shard is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.codes import numbered_files, read_array
from utils.files import read_json, write_atomic, write_json

MANIFEST = "features.json"
FORMAT = "packed text features, version 1"
ARRAYS = {"features": np.uint16, "offsets": np.int64, "keys": np.int64}
MAX_LINES = 2**40
Item = tuple[str, int, Tensor]


def to_bits(features: Tensor) -> np.ndarray:
    """Floats as the uint16 bit patterns of bfloat16, rounded to the nearest."""
    return features.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


def from_bits(bits: np.ndarray) -> Tensor:
    """The inverse of `to_bits`, as float32."""
    return torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16).float()


class FeatureFiles:
    """Features in one file per caption; `dim` (None: that of the first file) is required of every file."""

    def __init__(self, path: str | Path, dim: int | None = None) -> None:
        self.path, self._dim = Path(path), dim
        if not self.path.is_dir():
            raise FileNotFoundError(f"there are no text features in {path}: no such folder")

    @property
    def dim(self) -> int:
        """Length of a token's vector."""
        if self._dim is None:
            first = next(self.keys(), None)
            if first is None:
                raise FileNotFoundError(f"no text features in {self.path}; expected {{list}}/{{line}}.npy")
            self._dim = np.atleast_1d(read_array(self._file(*first), kinds="f")).shape[-1]
        return self._dim

    def _file(self, stem: str, line: int) -> Path:
        return self.path / stem / f"{line}.npy"

    def has(self, stem: str, line: int) -> bool:
        """Whether this caption has features."""
        return self._file(stem, line).is_file()

    def has_list(self, stem: str) -> bool:
        """Whether any caption of this list may have features."""
        return (self.path / stem).is_dir()

    def keys(self) -> Iterator[tuple[str, int]]:
        """(list stem, line) of every caption, lists by name and lines by number."""
        for folder in sorted(folder for folder in self.path.iterdir() if folder.is_dir()):
            yield from ((folder.name, line) for line in numbered_files(folder))

    def read(self, stem: str, line: int) -> Tensor:
        """The features of one caption, float32 (n, dim).

        Raises:
            ValueError: when the file is missing, unreadable, has a wrong shape or values that are not finite.
        """
        file = self._file(stem, line)
        features = read_array(file, kinds="f")
        if features.ndim != 3 or features.shape[0] != 1 or features.shape[1] < 1 or features.shape[2] != self.dim:
            raise ValueError(f"{file} must have the shape (1, tokens, {self.dim}), found {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"{file} holds values that are not finite")
        return torch.from_numpy(features[0].astype(np.float32))


class PackedFeatures:
    """Features in packed shards.

    Raises:
        FileNotFoundError: when there is no manifest.
        ValueError: when packing did not end, the manifest is damaged, or a shard is missing or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / MANIFEST).is_file():
            raise FileNotFoundError(f"there is no {MANIFEST} in {path}")
        manifest = _read_manifest(self.path)
        if not manifest["complete"]:
            raise ValueError(f"{self.path / MANIFEST}: packing has not finished; start the same command again")
        self.manifest = manifest
        self.dim: int = manifest["dim"]
        self._lists = {stem: number for number, stem in enumerate(manifest["lists"])}
        try:
            self._shards = [_Shard(self.path, entry) for entry in manifest["shards"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path / MANIFEST} is damaged; delete it and pack again") from error
        self._first = np.array([shard.first for shard in self._shards], np.int64)
        self._last = np.array([shard.last for shard in self._shards], np.int64)

    def __len__(self) -> int:
        return self.manifest["items"]

    def _find(self, stem: str, line: int) -> tuple[_Shard, int] | None:
        if stem not in self._lists or not 0 <= line < MAX_LINES:
            return None
        key = self._lists[stem] * MAX_LINES + line
        for number in np.flatnonzero((self._first <= key) & (key <= self._last)):
            if (place := self._shards[number].place(key)) is not None:
                return self._shards[number], place
        return None

    def has(self, stem: str, line: int) -> bool:
        """Whether this caption has features."""
        return self._find(stem, line) is not None

    def has_list(self, stem: str) -> bool:
        """Whether any caption of this list may have features."""
        return stem in self._lists

    def keys(self) -> Iterator[tuple[str, int]]:
        """(list stem, line) of every caption, in the order of the shards."""
        for shard in self._shards:
            for key in shard.array("keys"):
                yield self.manifest["lists"][int(key) // MAX_LINES], int(key) % MAX_LINES

    def read(self, stem: str, line: int) -> Tensor:
        """The features of one caption, float32 (n, dim).

        Raises:
            ValueError: when it has none, or they are damaged.
        """
        found = self._find(stem, line)
        if found is None:
            raise ValueError(f"{self.path} has no text features of line {line} of the list {stem!r}")
        features = from_bits(found[0].rows(found[1]))
        if not torch.isfinite(features).all():
            raise ValueError(f"{found[0].file('features')} holds values that are not finite; pack it again")
        return features

    def verify(self) -> Iterator[str]:
        """Read every byte and compare with the checksums; yields the name of each shard found good.

        Raises:
            ValueError: at the first shard that is damaged.
        """
        for shard in self._shards:
            shard.verify(self.dim)
            yield shard.name


class _Shard:
    """The arrays of one shard, memory-mapped when first used and by each process for itself."""

    def __init__(self, folder: Path, entry: dict) -> None:
        self.folder, self.entry = folder, entry
        self.name, self.first, self.last = entry["name"], entry["first"], entry["last"]
        self._arrays: dict[str, np.ndarray] = {}
        for kind in ARRAYS:
            size = self.file(kind).stat().st_size if self.file(kind).is_file() else "none"
            if size != entry["bytes"][kind]:
                raise ValueError(
                    f"{self.file(kind)} must have {entry['bytes'][kind]} bytes, found {size}; {_cure(self)}"
                )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arrays": {}}  # a pickled map would become a copy of the file

    def file(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}.npy"

    def array(self, kind: str) -> np.ndarray:
        if kind not in self._arrays:
            try:
                array = np.load(self.file(kind), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"cannot read {self.file(kind)} ({error}); {_cure(self)}") from error
            if array.dtype != ARRAYS[kind]:
                raise ValueError(f"{self.file(kind)} must hold {ARRAYS[kind].__name__}, found {array.dtype}")
            self._arrays[kind] = array
        return self._arrays[kind]

    def place(self, key: int) -> int | None:
        keys = self.array("keys")
        place = int(np.searchsorted(keys, key))
        return place if place < len(keys) and keys[place] == key else None

    def rows(self, place: int) -> np.ndarray:
        offsets, features = self.array("offsets"), self.array("features")
        start, stop = int(offsets[place]), int(offsets[place + 1])
        if not 0 <= start < stop <= len(features):
            raise ValueError(f"{self.file('offsets')} points outside of the shard; {_cure(self)}")
        return features[start:stop]

    def verify(self, dim: int) -> None:
        for kind in ARRAYS:
            if _sha256(self.file(kind)) != self.entry["sha256"][kind]:
                raise ValueError(f"{self.file(kind)} does not have the checksum it was written with; {_cure(self)}")
        keys, offsets, features = (self.array(kind) for kind in ("keys", "offsets", "features"))
        fits = features.shape == (self.entry["tokens"], dim) and len(offsets) == len(keys) + 1
        if not fits or offsets[0] != 0 or offsets[-1] != len(features) or (np.diff(offsets) < 1).any():
            raise ValueError(f"the arrays of {self.folder / self.name} do not fit each other; {_cure(self)}")


def _cure(shard: _Shard) -> str:
    return f"delete {shard.name}.json and {MANIFEST} there and pack again, or copy the shard once more"


def _read_manifest(folder: Path) -> dict:
    manifest = read_json(folder / MANIFEST)
    needed = {"format", "dim", "lists", "items", "complete", "shards"}
    if not isinstance(manifest, dict) or needed - set(manifest) or manifest["format"] != FORMAT:
        raise ValueError(f"{folder / MANIFEST} is not the manifest of {FORMAT}")
    return manifest


class FeatureWriter:
    """Writes packed features, shard by shard, in any order and from any number of processes; then one `finish`.

    `lists` are the stems of all lists. `encoder` and `encoder_sha256` say what made the features.

    Raises:
        ValueError: when the folder holds features of other lists, width or encoder.
    """

    def __init__(
        self,
        path: str | Path,
        lists: Sequence[str],
        dim: int,
        encoder: str | None = None,
        encoder_sha256: str | None = None,
    ) -> None:
        self.path, self.dim = Path(path), dim
        self.settings = {
            "format": FORMAT,
            "dtype": "bfloat16",
            "dim": dim,
            "encoder": encoder,
            "encoder_sha256": encoder_sha256,
            "lists": list(lists),
        }
        self._numbers = {stem: number for number, stem in enumerate(lists)}
        if (self.path / MANIFEST).is_file():
            found = _read_manifest(self.path)
            differ = [name for name, value in self.settings.items() if found.get(name) != value]
            if differ:
                raise ValueError(
                    f"{path} holds text features with another {differ[0]}; give another folder or delete it"
                )
        else:
            write_json(self.path / MANIFEST, {**self.settings, "items": 0, "complete": False, "shards": []})

    def has(self, shard: int) -> bool:
        """Whether shard number `shard` is written."""
        return (self.path / f"{shard:05d}.json").is_file()

    def write(self, shard: int, items: Iterable[Item]) -> None:
        """Write the captions (list stem, line, features float (n, dim)) as shard number `shard`.

        Raises:
            ValueError: when there are none, one comes twice, or features are empty, of another width or not finite.
        """
        bits = {self._key(stem, line): self._bits(stem, line, features) for stem, line, features in self._once(items)}
        if not bits:
            raise ValueError(f"shard {shard} of {self.path} would be empty")
        keys = sorted(bits)
        arrays = {
            "features": np.concatenate([bits[key] for key in keys]),
            "offsets": np.cumsum([0] + [len(bits[key]) for key in keys], dtype=np.int64),
            "keys": np.array(keys, np.int64),
        }
        files = {kind: self.path / f"{shard:05d}.{kind}.npy" for kind in arrays}
        for kind, array in arrays.items():
            write_atomic(files[kind], lambda file, array=array: np.save(file, array, allow_pickle=False))
        entry = {
            "name": f"{shard:05d}",
            "items": len(keys),
            "tokens": len(arrays["features"]),
            "first": keys[0],
            "last": keys[-1],
            "bytes": {kind: file.stat().st_size for kind, file in files.items()},
            "sha256": {kind: _sha256(file) for kind, file in files.items()},
        }
        write_json(self.path / f"{shard:05d}.json", entry)

    def _once(self, items: Iterable[Item]) -> Iterator[Item]:
        seen: set[tuple[str, int]] = set()
        for stem, line, features in items:
            if (stem, line) in seen:
                raise ValueError(f"line {line} of the list {stem!r} comes twice")
            seen.add((stem, line))
            yield stem, line, features

    def _key(self, stem: str, line: int) -> int:
        if stem not in self._numbers or not 0 <= line < MAX_LINES:
            raise ValueError(f"line {line} of {stem!r} is in none of the lists that {self.path} was made for")
        return self._numbers[stem] * MAX_LINES + line

    def _bits(self, stem: str, line: int, features: Tensor) -> np.ndarray:
        if features.ndim != 2 or features.shape[0] < 1 or features.shape[1] != self.dim:
            raise ValueError(
                f"the features of line {line} of {stem!r} must have the shape (tokens, {self.dim}), "
                f"found {tuple(features.shape)}"
            )
        if not torch.isfinite(features.to(torch.bfloat16)).all():
            raise ValueError(f"the features of line {line} of {stem!r} hold values that bfloat16 cannot hold")
        return to_bits(features)

    def finish(self) -> PackedFeatures:
        """Write the manifest over all shards that are there, and open them.

        Raises:
            ValueError: when there are none.
        """
        entries = [read_json(file) for file in sorted(self.path.glob("[0-9]*.json"))]
        if not entries:
            raise ValueError(f"no shards of text features were written to {self.path}")
        counts = {name: sum(entry[name] for entry in entries) for name in ("items", "tokens")}
        write_json(self.path / MANIFEST, {**self.settings, **counts, "complete": True, "shards": entries})
        return PackedFeatures(self.path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def open_features(path: str | Path, dim: int | None = None) -> FeatureFiles | PackedFeatures:
    """The text features in `path`, whichever layout they have.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when they are packed and damaged, or not of width `dim` (None: any).
    """
    if not (Path(path) / MANIFEST).is_file():
        return FeatureFiles(path, dim)
    packed = PackedFeatures(path)
    if dim is not None and packed.dim != dim:
        raise ValueError(f"{path} holds text features of width {packed.dim}, but {dim} is asked for")
    return packed
