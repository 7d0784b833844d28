"""Opening images, folders of images, and what happens to those that cannot be opened.

Readers are strict: an unreadable image raises `UnreadableImage`. Two wrappers decide what that means:
`SkipBad` for training (the next readable image takes its place) and `NumberedImages` for code extraction (the
image is left out and every other one keeps its number). Both stop with an error once too many are unreadable.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.files import read_json

CLASS_LIST = "classes.json"
_log = logging.getLogger("llamagen.dataset")


class UnreadableImage(ValueError):
    """An image file that is missing, broken or no image; the message names the file and the reason."""


class TooSmall(ValueError):
    """An image whose shorter side is below the size that was asked for."""


def read_rgb(path: str | Path, at_least: int = 0) -> Image.Image:
    """Decode an image file completely and convert it to RGB.

    Raises:
        TooSmall: when the shorter side is below `at_least` pixels (found from the header, before decoding).
        UnreadableImage: when the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            if min(image.size) < at_least:
                raise TooSmall(f"{path} is {image.width}x{image.height}, smaller than {at_least} pixels")
            return image.convert("RGB")
    except TooSmall:
        raise
    except Exception as error:  # each decoder has exceptions of its own
        raise UnreadableImage(f"cannot read the image {path} ({type(error).__name__}: {error})") from error


def is_image_name(name: str) -> bool:
    """True for the file names that folder readers take: those with an image extension that are not hidden."""
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def class_list(folder: str | Path) -> list[str] | None:
    """The class names in the classes.json in `folder` or, for a split, beside it; None without one."""
    for place in (Path(folder), Path(folder).parent):
        if (place / CLASS_LIST).is_file():
            names = read_json(place / CLASS_LIST)
            if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError(f"{place / CLASS_LIST} must hold a JSON list of class names")
            return names
    return None


class ClassFolders(ImageFolder):
    """Images in one folder per class: `{root}/{class}/.../{image}`; items are (image, class int).

    Classes are the sorted folder names, numbered from 0, unless a classes.json in or beside `root` lists
    them: then a split that lacks some classes has the same numbers as the whole. Images are numbered in
    sorted order.

    Raises:
        FileNotFoundError: when `root` is missing.
        ValueError: when it has no class folders, no images, or a class that is not in classes.json.
    """

    def __init__(self, root: str | Path, transform: Callable | None = None) -> None:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"there is no folder {root}; expected one with a sub-folder of images per class")
        super().__init__(str(root), transform, loader=read_rgb, is_valid_file=_is_image_path, allow_empty=True)
        if not self.samples:
            raise ValueError(f"no images in the class folders of {root}; known extensions: {' '.join(IMG_EXTENSIONS)}")

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        found = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_dir())
        if not found:
            raise ValueError(f"{directory} has no sub-folders; expected one folder of images per class")
        names = class_list(directory)
        if names is not None and set(found) - set(names):
            unknown = sorted(set(found) - set(names))
            raise ValueError(f"{directory} has the folder {unknown[0]!r}, which {CLASS_LIST} does not list")
        names = names or found
        return names, {name: number for number, name in enumerate(names)}


def _is_image_path(path: str) -> bool:
    return is_image_name(os.path.basename(path))


class BadItems:
    """The items that could not be read, counted over all DataLoader workers of a process.

    Each is logged once. `add` raises ValueError when more than `max_share` of all `count` items are bad.
    """

    def __init__(self, count: int, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"the largest share of bad items must lie between 0 and 1, found {max_share}")
        self.count, self.max_share = count, max_share
        self._flags = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def __contains__(self, index: int) -> bool:
        return bool(self._flags[index])

    def __len__(self) -> int:
        return int(self._flags.count_nonzero())

    def indices(self) -> list[int]:
        """The numbers of the bad items, sorted."""
        return self._flags.nonzero().flatten().tolist()

    def add(self, index: int, reason: object) -> None:
        """Note that item `index` is bad.

        Raises:
            ValueError: when that is one too many.
        """
        self._flags[index] = 1
        _log.warning("left out: %s", reason)
        if len(self) > self.max_share * self.count:
            raise ValueError(
                f"{len(self)} of {self.count} items cannot be read, more than {self.max_share:.1%} of all; "
                f"check the data folders. The last one: {reason}"
            )


class SkipBad(Dataset):
    """For training: an unreadable image is replaced by the next readable one, always the same.

    The length stays that of `dataset`, so that samplers and the position in an epoch keep their meaning.
    """

    def __init__(self, dataset: Dataset, max_share: float = 0.01) -> None:
        self.dataset = dataset
        self.bad = BadItems(len(dataset), max_share)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):  # also what ends `for item in dataset`
            raise IndexError(index)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if candidate in self.bad:
                continue
            try:
                return self.dataset[candidate]
            except UnreadableImage as error:
                self.bad.add(candidate, error)
        raise ValueError(f"none of the {len(self)} images can be read")


class NumberedImages(Dataset):
    """For code extraction: items are (index, *item of `dataset`), or None for an unreadable image.

    Images keep their numbers, so the code files of a bad image are simply missing. `bad.indices()` lists them
    afterwards. Collate with `collate_numbered`.
    """

    def __init__(self, dataset: Dataset, max_share: float = 0.01) -> None:
        self.dataset = dataset
        self.bad = BadItems(len(dataset), max_share)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple | None:
        try:
            return (index, *self.dataset[index])
        except UnreadableImage as error:
            self.bad.add(index, error)
            return None


def collate_numbered(items: list[tuple | None]) -> list[Any] | None:
    """A batch of the readable items of `NumberedImages`; None when there is none."""
    readable = [item for item in items if item is not None]
    return default_collate(readable) if readable else None
