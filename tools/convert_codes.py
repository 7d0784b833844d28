"""Convert extracted codes between the packed stores and the established layout of one file per image.

    python3 tools/convert_codes.py --from CODES --to PACKED --layout packed
    python3 tools/convert_codes.py --from PACKED --to CODES --layout files
    python3 tools/convert_codes.py --from PACKED --verify

Every set of codes in the folder is converted, class-conditional ({name}_codes and {name}_labels, or {name}_packed) and
text-conditional ({list}/{line}.npy, or a store of them). Started again after an interruption, the command continues.
--verify compares a store with its checksums and limits, and writes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from dataset.codes import CodeFolder, caption_codes_path, numbered_files, read_integers, write_array, write_codes
from dataset.packed import COMPANIONS, RECORD, SUFFIX, PackedCodes, find_stores, read_manifest
from dataset.packing import SHARD_SIZE, PackedWriter
from utils.args import make_parser
from utils.errors import run
from utils.files import read_json, write_json
from utils.progress import progress

_SETTINGS = (
    "data_path", "images", "image_size", "crops", "tokenizer", "tokenizer_sha256", "dataset", "source_sha256",
    "classes",
)  # fmt: skip


def convert(source: Path, target: Path, layout: str, codebook_size: int | None, shard_size: int) -> None:
    """Convert every set of codes in `source`.

    Raises:
        FileNotFoundError: when there is none of the other layout.
        ValueError: when codes are broken, or `target` is `source`.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"--from and --to are the same folder {source}; give another --to")
    if layout == "files":
        for folder in _stores(source):
            unpack(folder, target)
        return
    folders = _class_folders(source)
    lists = [path for path in sorted(source.glob("*")) if path.is_dir() and numbered_files(path)] if not folders else []
    if not folders and not lists:
        raise FileNotFoundError(f"no code files in {source}; expected folders *_codes and *_labels, or lists of them")
    for folder in folders:
        pack_classes(folder, target, codebook_size, shard_size)
    if lists:
        pack_captions(lists, target, codebook_size, shard_size)


def _stores(source: Path) -> list[Path]:
    found = find_stores(source)
    if not found:
        raise FileNotFoundError(f"no packed store in {source}; expected a folder *{SUFFIX} with a manifest.json")
    return found


def _class_folders(source: Path) -> list[CodeFolder]:
    stems = [path.name.removesuffix("_codes") for path in sorted(source.glob("*_codes")) if path.is_dir()]
    return [CodeFolder(source / f"{stem}_codes", source / f"{stem}_labels") for stem in stems]


def _known_settings(folder: Path, stem: str) -> dict[str, Any]:
    """How the codes in `folder` were made, as far as that was noted."""
    record = folder / RECORD
    known = read_json(record) if record.is_file() else {}
    settings = {name: known[name] for name in _SETTINGS if name in known and name != "images"}
    if parts := re.fullmatch(r"(.*\D|)(\d+)", stem):
        settings = {"dataset": parts[1], "image_size": int(parts[2]), **settings}
    return settings


def pack_classes(folder: CodeFolder, target: Path, codebook_size: int | None, shard_size: int) -> None:
    """Pack one pair of folders into `{target}/{name}_packed`; numbers without a file become missing rows."""
    stem, indices = folder.codes.name.removesuffix("_codes"), folder.indices()
    first, _ = folder.read(indices[0])
    store = PackedWriter(
        target / f"{stem}{SUFFIX}", "class", images=indices[-1] + 1, views=first.shape[1], tokens=first.shape[2],
        codebook_size=codebook_size, settings=_known_settings(folder.codes.parent, stem), shard_size=shard_size,
    )  # fmt: skip
    present = set(indices)

    def row(index: int) -> tuple[np.ndarray, int] | None:
        if index not in present:
            return None
        codes, label = folder.read(index, codebook_size)
        return _of_shape(codes[0], store, folder.codes / f"{index}.npy"), label[0]

    _pack(store, row, f"pack {stem}")


def pack_captions(lists: list[Path], target: Path, codebook_size: int | None, shard_size: int) -> None:
    """Pack the codes of caption lists into `{target}/t2i_packed`."""
    keys = [(number, line) for number, path in enumerate(lists) for line in numbered_files(path)]
    first = read_integers(caption_codes_path(lists[0].parent, lists[0].name, keys[0][1]), (1, None))
    settings = {**_known_settings(lists[0].parent, ""), "stems": [path.name for path in lists]}
    store = PackedWriter(
        target / f"t2i{SUFFIX}", "caption", images=len(keys), views=1, tokens=first.shape[1],
        codebook_size=codebook_size, settings=settings, shard_size=shard_size,
    )  # fmt: skip

    def row(index: int) -> tuple[np.ndarray, tuple[int, int]]:
        number, line = keys[index]
        path = lists[number] / f"{line}.npy"
        return _of_shape(read_integers(path, (1, None), codebook_size), store, path), keys[index]

    _pack(store, row, "pack the lists")


def _of_shape(codes: np.ndarray, store: PackedWriter, path: Path) -> np.ndarray:
    if codes.shape != store.shape:
        raise ValueError(
            f"{path} holds codes of the shape {codes.shape}, the first file {store.shape}; extract it again"
        )
    if codes.max() >= (limit := np.iinfo(store.dtype).max + 1):
        raise ValueError(f"{path} holds the code {codes.max()}, above {limit - 1}: give --codebook-size")
    return codes


def _pack(store: PackedWriter, row: Callable[[int], tuple[np.ndarray, Any] | None], what: str) -> None:
    """Fill the missing shards of `store`; `row` gives the codes and the companion of an index, or None."""
    store.claim()
    absent = [shard for shard in range(len(store.shards)) if not store.has(shard)]
    images = store.record["images"]
    with progress(images, "image", done=images - sum(len(store.shards[shard]) for shard in absent), what=what) as bar:
        for shard in absent:
            rows = [row(index) for index in store.shards[shard]]
            width = (2,) if store.companion == COMPANIONS["caption"] else ()
            empty = np.zeros(store.shape, store.dtype), np.full(width, -1)
            codes, companion = (np.stack([np.asarray((found or empty)[part]) for found in rows]) for part in (0, 1))
            missing = [index for index, found in zip(store.shards[shard], rows) if found is None]
            store.write(shard, codes, companion, missing)
            bar.update(len(rows))
    store.finish()


def unpack(folder: Path, target: Path) -> None:
    """Write the files of one store below `target`; those that are there are left alone."""
    kind = read_manifest(folder)["kind"]
    store = PackedCodes(folder, kind)
    _note_settings(target / RECORD, {name: store.manifest[name] for name in _SETTINGS if name in store.manifest})
    codes = CodeFolder(*(target / f"{folder.name.removesuffix(SUFFIX)}_{part}" for part in ("codes", "labels")))
    with progress(len(store.indices()), "image", what=f"unpack {folder.name}") as bar:
        for index in store.indices():
            if kind == "class" and not codes.has(index):
                array, label = store.read(index)
                write_codes(codes, index, array, label.item())
            elif kind == "caption":
                array, (number, line) = store.row(index)
                path = caption_codes_path(target, store.manifest["stems"][number], line)
                if not path.is_file():
                    write_array(path, array)
            bar.update()


def _note_settings(record: Path, settings: dict[str, Any]) -> None:
    known = read_json(record).get("tokenizer_sha256") if record.is_file() else None
    if known not in (None, settings.get("tokenizer_sha256")):
        raise ValueError(f"{record.parent} holds codes of another tokenizer; give another --to")
    write_json(record, settings)


def verify(source: Path) -> None:
    """Check every store in `source`.

    Raises:
        ValueError: names the first file that is wrong.
    """
    for folder in _stores(source):
        store = PackedCodes(folder, read_manifest(folder)["kind"])
        store.verify()
        print(f"{folder}: {len(store.indices())} images in {len(store.manifest['shards'])} shards, all as written")


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--from", dest="source", type=Path, required=True, help="folder of codes")
    flags.add_argument("--to", dest="target", type=Path, help="folder to write to")
    flags.add_argument("--layout", choices=["packed", "files"], default="packed", help="what to write")
    flags.add_argument("--verify", action="store_true", help="check the packed stores in --from and write nothing")
    flags.add_argument("--codebook-size", type=int, help="codebook entries, for packing; checked and noted")
    flags.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="images in a packed file, at most")
    return flags


def main() -> None:
    """Convert or verify."""
    args = parser().parse_args()
    if args.verify:
        return verify(args.source)
    if args.target is None:
        raise ValueError("--to is missing: give the folder to write the converted codes to")
    return convert(args.source, args.target, args.layout, args.codebook_size, args.shard_size)


if __name__ == "__main__":
    run(main)
