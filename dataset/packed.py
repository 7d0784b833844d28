"""Packed code stores: the codes of a whole data set in a few memory-mapped files, a quarter of the size.

    {store}/manifest.json      what the codes are and how they were made; it is written last: the store is complete
    {store}/extraction.json    the same facts while the store is being filled
    {store}/codes-00000.npy    uint16 (n, A, T), uint32 for codebooks above 65,536 entries: A views, T tokens each
    {store}/labels-00000.npy   int64 (n,): classes; or keys-00000.npy, int64 (n, 2): list number and line
    {store}/codes-00000.json   this shard's counts and checksums; it is written last: the shard is complete

Row i belongs to image i of the sorted folder, or to record i of the caption lists, so any row is found without a
search. Images that could not be read keep their row; the manifest lists them as missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import read_json, sha256_of

FORMAT = 1
MANIFEST, RECORD = "manifest.json", "extraction.json"
SUFFIX = "_packed"
COMPANIONS = {"class": "labels", "caption": "keys"}


def code_dtype(codebook_size: int) -> np.dtype:
    """The integer type that codes below `codebook_size` are stored in."""
    return np.dtype(np.uint16 if codebook_size <= 2**16 else np.uint32)


def note_name(shard: int) -> str:
    """The name of the file that says that a shard is complete."""
    return f"codes-{shard:05d}.json"


def fault_of(folder: Path, note: Mapping[str, Any], checksums: bool = True) -> str | None:
    """What is wrong with the files of a shard, in words; None when nothing is."""
    for file in note["files"].values():
        path = folder / file["name"]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, {file['bytes']} were written"
        if checksums and sha256_of(path) != file["sha256"]:
            return f"{path} has another checksum than when it was written"
    return None


class PackedCodes:
    """Reads a complete store at any row. Shards are mapped when they are first needed, in each process anew.

    Attributes:
        manifest: the facts about the store.
        views, tokens: A and T.

    Raises:
        FileNotFoundError: when there is no store.
        ValueError: when it is not complete, of another kind, of a later format, or a file has the wrong size; with
            `vocab_size`, when the codebook is larger.
    """

    def __init__(self, folder: str | Path, kind: str = "class", vocab_size: int | None = None) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        if self.manifest["kind"] != kind:
            raise ValueError(f"{folder} holds codes by {self.manifest['kind']}, expected codes by {kind}")
        self.views, self.tokens = self.manifest["views"], self.manifest["tokens"]
        self._companion, self._notes = COMPANIONS[kind], self.manifest["shards"]
        self._step = self._notes[0]["count"]
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._require_vocabulary(vocab_size)
        self._require_sound(checksums=False)

    def _require_vocabulary(self, vocab_size: int | None) -> None:
        codebook = self.manifest["codebook_size"]
        if vocab_size is not None and codebook is not None and codebook > vocab_size:
            raise ValueError(
                f"{self.folder} holds codes of a codebook with {codebook} entries, more than the vocabulary of "
                f"{vocab_size}; give --vocab-size {codebook}"
            )

    def _require_sound(self, checksums: bool) -> None:
        for note in self._notes:
            fault = fault_of(self.folder, note, checksums)
            if fault:
                raise ValueError(f"{fault}; copy it again, or start its extraction again, which redoes this shard")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a pickled map would be a copy of its whole file

    def indices(self) -> Sequence[int]:
        """The sorted rows that have codes."""
        images, missing = self.manifest["images"], set(self.manifest["missing"])
        return [row for row in range(images) if row not in missing] if missing else range(images)

    def require(self, rows: Iterable[int]) -> None:
        """Check that all of `rows` have codes.

        Raises:
            ValueError: when one has none.
        """
        lacking = sorted(set(rows) - set(self.indices()))
        if lacking:
            raise ValueError(
                f"{self.folder} is incomplete: {len(lacking)} images are missing, the first {lacking[0]}; extract them "
                "from the same images or move the folder away"
            )

    def _shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._maps:
            note = self._notes[number]
            codes, companion = (self._map(note["files"][part]["name"]) for part in ("codes", self._companion))
            wanted = (note["count"], self.views, self.tokens)
            if codes.shape != wanted or str(codes.dtype) != self.manifest["dtype"] or len(companion) != note["count"]:
                path, dtype = self.folder / note["files"]["codes"]["name"], self.manifest["dtype"]
                raise ValueError(f"{path} must hold {dtype} {wanted}, found {codes.dtype} {codes.shape}")
            self._maps[number] = codes, companion
        return self._maps[number]

    def _map(self, name: str) -> np.ndarray:
        try:
            mapped = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"cannot read {self.folder / name} ({error})") from error
        return mapped.view(np.ndarray)  # indexing the plain class is several times faster

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (A, T) as stored and the companion () or (2,) of one row; both are views of the mapped file."""
        number, place = divmod(row, self._step)
        codes, companion = self._shard(number)
        return codes[place], companion[place]

    def read_view(
        self, row: int, view: int, vocab_size: int | None = None, num_classes: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """One view's codes (1, T) and the label (1,) of an image, int64, checked against the limits given.

        Raises:
            ValueError: when a code or label lies outside its limit.
        """
        codes, label = self.row(row)
        codes = codes[view : view + 1].astype(np.int64)
        self._require_below(codes.max(), vocab_size, row, "codes")
        self._require_below(label, num_classes, row, "labels")
        return codes, np.array([label])

    def read(
        self, row: int, vocab_size: int | None = None, num_classes: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All codes (1, A, T) and the label (1,) of an image, int64, checked against the limits given.

        Raises:
            ValueError: when a code or label lies outside its limit.
        """
        codes, label = self.row(row)
        self._require_below(codes.max(), vocab_size, row, "codes")
        self._require_below(label, num_classes, row, "labels")
        return codes[None].astype(np.int64), np.array([label])

    def _require_below(self, value: int, limit: int | None, row: int, what: str) -> None:
        if value < 0 or (limit is not None and value >= limit):
            allowed = "0 or more" if limit is None else f"0 to {limit - 1}"
            raise ValueError(f"{self.folder} row {row}: {what} must hold values of {allowed}, found {value}")

    def verify(self) -> None:
        """Compare every checksum, and every code and label with the codebook and the classes.

        Raises:
            ValueError: names the first file that is wrong.
        """
        self._require_sound(checksums=True)
        limit, missing = self.manifest["codebook_size"], set(self.manifest["missing"])
        classes = len(self.manifest.get("classes") or ()) or None
        for number, note in enumerate(self._notes):
            codes, companion = self._shard(number)
            present = np.array([note["first"] + i not in missing for i in range(note["count"])])
            if limit is not None and codes.max() >= limit:
                raise ValueError(f"{self.folder} shard {number} holds the code {codes.max()} of a codebook of {limit}")
            kept = companion[present]
            if self._companion == "labels" and len(kept) and (kept.min() < 0 or (classes and kept.max() >= classes)):
                raise ValueError(f"{self.folder} shard {number} holds labels from {kept.min()} to {kept.max()}")


class CaptionCodes:
    """Codes of caption lists at any (list stem, line), over all stores in a folder.

    Attributes:
        keys: (stem, line) of every record that has codes, lists sorted by name, lines by number.
        views, tokens: A (the smallest of all stores) and T.

    Raises:
        FileNotFoundError: when there is no store in `code_path`.
        ValueError: as in `PackedCodes`; when stores differ in tokens or tokenizer, or hold the same list.
    """

    def __init__(self, code_path: str | Path, vocab_size: int | None = None) -> None:
        found = find_stores(code_path)
        if not found:
            raise FileNotFoundError(
                f"no packed store of codes in {code_path}; run scripts/autoregressive/extract_codes_t2i.sh"
            )
        self.stores = [PackedCodes(folder, "caption", vocab_size) for folder in found]
        for other in self.stores[1:]:
            require_same_tokenizer(self.stores[0], other)
        self.tokens = self.stores[0].tokens
        self.views = min(store.views for store in self.stores)
        self._places: dict[str, tuple[PackedCodes, np.ndarray, np.ndarray]] = {}
        for store in self.stores:
            self._add(store)

    def _add(self, store: PackedCodes) -> None:
        keys = np.concatenate([store._shard(number)[1] for number in range(len(store.manifest["shards"]))])
        rows = np.asarray(store.indices(), dtype=np.int64)
        for number, stem in enumerate(store.manifest["stems"]):
            if stem in self._places:
                raise ValueError(f"{store.folder} and {self._places[stem][0].folder} both hold codes of {stem!r}")
            own = rows[keys[rows, 0] == number]
            self._places[stem] = store, keys[own, 1], own

    @property
    def stems(self) -> list[str]:
        """The names of the lists, sorted."""
        return sorted(self._places)

    @property
    def keys(self) -> list[tuple[str, int]]:
        return [(stem, line) for stem in self.stems for line in self._places[stem][1].tolist()]

    def __len__(self) -> int:
        return sum(len(lines) for _, lines, _ in self._places.values())

    def read(self, stem: str, line: int, vocab_size: int | None = None, view: int = 0) -> np.ndarray:
        """The codes of one record, int64 (1, T), `view` is below `views`.

        Raises:
            ValueError: when it has none, or a code lies outside the vocabulary.
        """
        store, lines, rows = self._places.get(stem, (None, np.zeros(0), None))
        place = int(np.searchsorted(lines, line))
        if store is None or place == len(lines) or lines[place] != line:
            raise ValueError(f"there are no codes of line {line} of the list {stem!r}; extract them first")
        codes, _ = store.row(int(rows[place]))
        store._require_below(codes.max(), vocab_size, int(rows[place]), "codes")
        return codes[view : view + 1].astype(np.int64)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete store.

    Raises:
        FileNotFoundError: when `folder` is no store.
        ValueError: when its extraction is not finished, or it is of a later format.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        if not (folder / RECORD).is_file():
            raise FileNotFoundError(f"there is no packed store of codes at {folder}")
        done, shards = len(list(folder.glob("codes-*.json"))), read_json(folder / RECORD)["shards"]
        raise ValueError(
            f"the extraction into {folder} is not finished ({done} of {shards} shards are there): start the same "
            "extraction again, it goes on where it stopped"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} has the format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def is_store(folder: str | Path) -> bool:
    """True for a packed store, complete or not."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return True
    return (folder / RECORD).is_file() and "format" in read_json(folder / RECORD)


def find_stores(code_path: str | Path) -> list[Path]:
    """The stores at `code_path`: itself, or the sorted folders `*_packed` in it."""
    if is_store(code_path):
        return [Path(code_path)]
    return [path for path in sorted(Path(code_path).glob(f"*{SUFFIX}")) if is_store(path)]


def find_store(code_path: str | Path, image_size: int) -> Path | None:
    """The one store of class codes of `image_size`: that of imagenet, else the only one; None without any.

    Raises:
        ValueError: when several data sets have codes of that size there, or `code_path` is a store of another size.
    """
    if is_store(code_path):
        known = read_json(Path(code_path, MANIFEST if Path(code_path, MANIFEST).is_file() else RECORD))
        if known.get("image_size") not in (None, image_size):
            raise ValueError(f"{code_path} holds codes of {known['image_size']} pixels, --image-size is {image_size}")
        return Path(code_path)
    pattern = re.compile(rf"(.*\D|){image_size}{SUFFIX}")
    found = {path.name: path for path in find_stores(code_path) if pattern.fullmatch(path.name)}
    established = f"imagenet{image_size}{SUFFIX}"
    if established in found or len(found) <= 1:
        return found.get(established, next(iter(found.values()), None))
    raise ValueError(f"{code_path} holds codes of several data sets ({', '.join(found)}); keep one in each folder")


def sibling_105(folder: Path) -> Path:
    """The folder of the same name in `..._ten_crop_105`, when this one lies in `..._ten_crop`; else this one."""
    parent = folder.parent
    if not parent.name.endswith("ten_crop"):
        return folder
    return parent.with_name(f"{parent.name}_105") / folder.name


def require_same_tokenizer(first: PackedCodes, second: PackedCodes) -> None:
    """Check that two stores hold codes of one tokenizer and one length.

    Raises:
        ValueError: when they do not.
    """
    for name in ("tokens", "tokenizer_sha256"):
        one, two = first.manifest.get(name), second.manifest.get(name)
        if None not in (one, two) and one != two:
            raise ValueError(f"{first.folder} and {second.folder} differ in {name}: {one} and {two}")
