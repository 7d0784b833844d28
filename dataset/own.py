"""Own images in one command: whatever they lie in becomes a data set that every other command takes.

    python3 dataset/own.py --source photos --data-path data/photos --size 256

--source is one of

    a folder of images        sub-folders are classes; captions stand in .txt files of the same name, or in a table
                              given by --captions (or called metadata or captions, in the folder)
    a table                   .csv, .tsv, .jsonl or .parquet with a column of image paths (relative to the table), or of
                              the images themselves (parquet), and maybe columns of captions and labels
    tar shards                a .tar or a folder of them, as dataset/tars.py and WebDataset write them

and the result is

    DIR/{split}/{label}/.../{image}      splits train and val; the label is "unlabelled" where there are none
    DIR/{split}/{split}.jsonl            {"image_path", "text": captions, "label"} per line, paths from there
    DIR/classes.json                     class names; a class's number is its place, the same in both splits
    DIR/own.json                         settings, counts, and the images that were left out

so that DIR/train serves as --data-path of the class-conditional and of the text-conditional commands. Images are
hard-linked or copied as they are; with --size they are cropped and written as PNG. The split is decided by each image's
bytes alone: copies never end up on both sides, and new images do not move the others. An image without a caption gets
its class name. Stopped or run on a grown source, the command goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dataset.augmentation import center_crop_arr
from dataset.images import CLASS_LIST, BadItems, is_image_name
from dataset.sources import COLUMNS, Entry, image_files, list_entries
from utils import errors
from utils.args import add_bad_images_arg, add_seed_arg, make_parser
from utils.claim import claim_folder
from utils.files import atomic_path, write_atomic, write_json
from utils.progress import progress

MANIFEST = "own.json"
SUMMARY = ("images", "classes", "captioned", "copies", "left_out", "not_in_source")  # what it says beside the settings
SPLITS = ("train", "val")
UNLABELLED = "unlabelled"
EXTENSIONS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm"}
CHUNK = 256  # images in work at a time


@dataclass(frozen=True)
class Placed:
    """Where an image went: split, and path from there."""

    split: str
    path: str
    digest: str


def make_data_set(
    source: str | Path,
    data_path: str | Path,
    *,
    size: int | None = None,
    val_share: float = 0.05,
    seed: int = 0,
    captions: str | Path | None = None,
    columns: dict[str, str | None] | None = None,
    max_bad_share: float = 0.01,
    threads: int = 4,
) -> dict[str, Any]:
    """Write the data set described at the top of this file and return what own.json says about it.

    Raises:
        FileNotFoundError: when the source is missing.
        ValueError: when an argument is wrong, too many images are broken, or `data_path` holds something else.
    """
    if not 0 <= val_share < 1 or (size is not None and size < 1):
        raise ValueError(f"the held-out share must be in [0, 1) and the size at least 1, found {val_share} and {size}")
    folder = Path(data_path)
    if Path(source).resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"{folder} lies in the source {source}; choose a folder outside of it")
    entries = list_entries(source, captions, columns or {})
    _name_labels(entries)
    settings = {"source": str(Path(source).resolve()), "size": size, "val_share": val_share, "seed": seed}
    claim_folder(folder, folder / MANIFEST, settings, "images", unchecked=SUMMARY)
    bad = BadItems(len(entries), max_bad_share)
    placed, left_out = _place_all(entries, Writer(folder, size, val_share, seed), bad, threads)
    if not placed:
        raise ValueError(f"none of the {len(entries)} images in {source} can be read")
    classes = sorted({entry.label for entry, _ in placed}, key=_class_order)
    write_json(folder / CLASS_LIST, classes)
    for split in SPLITS:
        _write_captions(folder, split, [(entry, place) for entry, place in placed if place.split == split])
    digests = Counter(place.digest for _, place in placed)
    summary = {
        "images": {split: sum(place.split == split for _, place in placed) for split in SPLITS},
        "classes": len(classes),
        "captioned": sum(bool(entry.captions) for entry, _ in placed),
        "copies": len(placed) - len(digests),
        "left_out": left_out,
        "not_in_source": _strangers(folder, {f"{place.split}/{place.path}" for _, place in placed}),
    }
    write_json(folder / MANIFEST, {**settings, **summary})
    return summary


def _name_labels(entries: list[Entry]) -> None:
    """Make every label the name of a folder."""
    origin: dict[str, str] = {}
    for entry in entries:
        label = re.sub(r"[/\\\x00-\x1f]", "_", entry.label.strip()) or UNLABELLED
        label = "_" + label[1:] if label.startswith(".") else label
        if len(os.fsencode(label)) > 200:
            raise ValueError(f"the label {label[:40]!r}... is too long to be a folder; is it a caption?")
        if origin.setdefault(label, entry.label.strip()) != entry.label.strip():
            raise ValueError(
                f"the labels {origin[label]!r} and {entry.label!r} would share the folder {label}; rename one"
            )
        entry.label = label


def _class_order(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


@dataclass(frozen=True)
class Writer:
    """Puts images in their places."""

    folder: Path
    size: int | None
    val_share: float
    seed: int

    def split(self, digest: str) -> str:
        """The side of an image, from its bytes and the seed."""
        draw = hashlib.sha256(f"{self.seed} {digest}".encode()).digest()
        return SPLITS[int.from_bytes(draw[:8], "big") < self.val_share * 2**64]

    def place(self, entry: Entry) -> Placed:
        """Write one image unless it is there.

        Raises:
            Exception: of many kinds, when it cannot be read.
        """
        data = entry.load()
        digest = hashlib.sha256(data).hexdigest()
        with Image.open(io.BytesIO(data)) as image:
            path = self._path(entry, image.format or "")
            split = self.split(digest)
            target = self.folder / split / path
            if not target.is_file() or (self.size is None and target.stat().st_size != len(data)):
                pixels = image.convert("RGB")  # decodes all of it
                target.parent.mkdir(parents=True, exist_ok=True)
                self._write(target, entry, data, pixels)
        return Placed(split, path, digest)

    def _path(self, entry: Entry, image_format: str) -> str:
        name = entry.name.removeprefix(f"{entry.label}/")
        if self.size is not None:
            name = name if name.lower().endswith(".png") else f"{name}.png"
        elif not is_image_name(Path(name).name):
            if image_format not in EXTENSIONS:
                raise ValueError(f"its format {image_format} is read by no command; --size makes it PNG")
            name += EXTENSIONS[image_format]
        return f"{entry.label}/{name}"

    def _write(self, target: Path, entry: Entry, data: bytes, pixels: Image.Image) -> None:
        if self.size is not None:
            write_atomic(target, lambda file: center_crop_arr(pixels, self.size).save(file, "PNG"))
        elif entry.file is None:
            write_atomic(target, lambda file: file.write(data))
        else:
            with atomic_path(target) as temporary:
                _link_or_copy(entry.file.resolve(), temporary)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _place_all(
    entries: list[Entry], writer: Writer, bad: BadItems, threads: int
) -> tuple[list[tuple[Entry, Placed]], list[list[str]]]:
    def attempt(entry: Entry) -> Placed | Exception:
        try:
            return writer.place(entry)
        except Exception as error:  # each decoder has exceptions of its own
            return error

    placed: dict[str, tuple[Entry, Placed]] = {}
    left_out: list[list[str]] = []
    with ThreadPoolExecutor(threads) as pool, progress(len(entries), "image", what="own data") as bar:
        for start in range(0, len(entries), CHUNK):
            part = entries[start : start + CHUNK]
            for number, (entry, result) in enumerate(zip(part, pool.map(attempt, part)), start):
                bar.update()
                if isinstance(result, Placed) and f"{result.split}/{result.path}" in placed:
                    result = ValueError(f"another image has the place {result.path} already")
                if isinstance(result, Placed):
                    placed[f"{result.split}/{result.path}"] = (entry, result)
                else:
                    _require_space(result)
                    left_out.append([entry.name, f"{type(result).__name__}: {result}"])
                    bad.add(number, f"{entry.name} ({result})")
    return list(placed.values()), left_out


def _require_space(error: Exception) -> None:
    if "no space left" in str(error) or isinstance(error, PermissionError):
        raise error


def _write_captions(folder: Path, split: str, part: list[tuple[Entry, Placed]]) -> None:
    lines = []
    for entry, place in sorted(part, key=lambda pair: pair[1].path):
        spoken = re.sub(r"[_-]+", " ", entry.label).strip()
        captions = entry.captions or ([] if entry.label == UNLABELLED else [spoken])
        line = {"image_path": place.path, "text": captions, "label": entry.label}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(folder / split / f"{split}.jsonl", lambda f: f.write("".join(lines).encode("utf-8", "surrogatepass")))


def _strangers(folder: Path, known: set[str]) -> list[str]:
    found = (file.relative_to(folder).as_posix() for split in SPLITS for file in image_files(folder / split))
    return [name for name in found if name not in known]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", required=True, help="folder of images, table, or tar shards")
    parser.add_argument("--data-path", required=True, help="folder to write (new, or from an earlier run)")
    parser.add_argument("--size", type=int, help="crop to this many pixels; the default keeps the images as they are")
    parser.add_argument("--val-share", type=float, default=0.05, help="share held out for validation")
    add_seed_arg(parser, "--seed", help="of the split")
    parser.add_argument("--captions", help="table of captions for a folder of images")
    for role in COLUMNS:
        parser.add_argument(f"--{role}-column", help=f"the table's column with the {role}; the default is a good guess")
    parser.add_argument("--num-threads", type=int, default=4, help="images decoded at the same time")
    add_bad_images_arg(parser.add_argument_group("bad images"))
    args = parser.parse_args()
    summary = make_data_set(
        args.source,
        args.data_path,
        size=args.size,
        val_share=args.val_share,
        seed=args.seed,
        captions=args.captions,
        columns={role: getattr(args, f"{role}_column") for role in COLUMNS},
        max_bad_share=args.max_bad_share,
        threads=args.num_threads,
    )
    images = summary["images"]
    print(f"{args.data_path}: {images['train']} + {images['val']} images in {summary['classes']} classes")
    for name, reason in summary["left_out"]:
        print(f"left out {name}: {reason}")
    if summary["not_in_source"]:
        strangers = summary["not_in_source"]
        print(f"{len(strangers)} images there are not in the source (any more), such as {strangers[0]}; delete them")


if __name__ == "__main__":
    errors.run(main)
