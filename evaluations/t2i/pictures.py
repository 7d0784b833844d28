"""The pictures that a text-to-image evaluation reads: those that were generated, with captions, and real ones."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.images import is_image_name, read_rgb

RESULTS, CAPTIONS = "result.jsonl", "captions.txt"


class Generated(NamedTuple):
    """A generated picture and what it should show."""

    path: Path
    caption: str


def generated_pictures(folder: str | Path, how_many: int) -> list[Generated]:
    """The generated pictures under `folder` in the order of their prompts.

    With a result.jsonl (what sampling writes) exactly the pictures it lists count; others in images/, such as the
    fillers by which the established sampler completes its last batch, do not. Pictures after the first `how_many` may
    be missing: the established sampler lists all prompts even when it was asked for fewer pictures. Without a
    result.jsonl line i of captions.txt belongs to picture i of images/ in natural order.

    Raises:
        ValueError: when pictures are missing, or captions and pictures are not equally many.
    """
    folder = Path(folder)
    images = folder / "images"
    if not images.is_dir():
        raise FileNotFoundError(f"there is no folder {images}; expected the folder that sample_t2i_ddp.py wrote")
    if not (folder / RESULTS).is_file():
        return _by_order(folder, images)
    listed = [Generated(images / Path(entry["image_path"]).name, entry["text"]) for entry in _entries(folder / RESULTS)]
    present = [entry.path.is_file() for entry in listed]
    if not all(present[:how_many]):
        missing = listed[present.index(False)].path
        raise ValueError(
            f"{folder / RESULTS} lists {len(listed)} pictures, but {missing} is missing; run the sampler to its end, "
            f"or give --how_many {present.index(False)}"
        )
    found = [entry for entry, there in zip(listed, present) if there]
    if not found:
        raise ValueError(f"none of the pictures that {folder / RESULTS} lists is in {images}")
    return found


def _entries(path: Path) -> list[dict[str, str]]:
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # captions may hold other line ends
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entries.append({"image_path": str(entry["image_path"]), "text": str(entry["text"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"text": ..., "image_path": ...}}, found {line[:60]!r}'
            ) from error
    if not entries:
        raise ValueError(f"{path} lists no pictures")
    return entries


def _by_order(folder: Path, images: Path) -> list[Generated]:
    if not (folder / CAPTIONS).is_file():
        raise FileNotFoundError(f"{folder} has neither {RESULTS} nor {CAPTIONS}")
    captions = (folder / CAPTIONS).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    paths = sorted(images.glob("*.png"), key=natural_key)
    if len(paths) != len(captions):
        raise ValueError(
            f"{images} has {len(paths)} PNGs, {folder / CAPTIONS} has {len(captions)} lines: which caption is of which "
            f"picture? Remove what does not belong there, or give a {RESULTS}"
        )
    return [Generated(path, caption.removesuffix("\r")) for path, caption in zip(paths, captions)]


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sorts names with numbers by the numbers: 9.png before 10.png."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def reference_pictures(folder: str | Path, data: str, kind: str) -> list[Path]:
    """All images under the reference folder, sub-folders too: val2014/ for COCO, else the sub-folder `kind`.

    Raises:
        FileNotFoundError: when it is missing.
        ValueError: when it has no images.
    """
    place = Path(folder) / ("val2014" if data == "coco2014" else kind)
    if not place.is_dir():
        what = "COCO 2014's validation images in val2014/" if data == "coco2014" else f"the images of --ref_type {kind}"
        raise FileNotFoundError(f"there is no folder {place}; --ref_dir must have {what}")
    paths = sorted(path for path in place.rglob("*") if is_image_name(path.name) and path.is_file())
    if not paths:
        raise ValueError(f"there are no images in {place}")
    return paths


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle, resized to `size` x `size` with Lanczos weights, as the published numbers."""
    edge = min(image.size)
    left, top = round((image.width - edge) / 2), round((image.height - edge) / 2)
    return image.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.LANCZOS)


class SquarePictures(Dataset):
    """Image files as pictures uint8 (size, size, 3)."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(centre_square(read_rgb(self.paths[index]), self.size)))
