"""OpenImages: images listed in a JSON file."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.images import SkipBad, read_rgb
from utils.files import read_json


class DatasetJson(Dataset):
    """The images that `{data_path}/image_paths.json` lists, relative to it; items are (image, tensor(0)).

    Raises:
        FileNotFoundError: when there is no such list.
        ValueError: when it is not a JSON list of paths, or empty.
    """

    def __init__(self, data_path: str | Path, transform: Callable | None = None) -> None:
        list_file = Path(data_path) / "image_paths.json"
        if not list_file.is_file():
            raise FileNotFoundError(f"there is no {list_file}; write it with tools/openimage_json.py")
        paths = read_json(list_file)
        if not (isinstance(paths, list) and paths and all(isinstance(path, str) for path in paths)):
            raise ValueError(f"{list_file} must hold a JSON list with at least one path")
        self.data_path, self.image_paths, self.transform = data_path, paths, transform

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        image = read_rgb(Path(self.data_path) / self.image_paths[index])
        return self.transform(image) if self.transform else image, torch.tensor(0)


def build_openimage(args: Namespace, transform: Callable) -> SkipBad:
    """The images listed in `args.data_path`; an unreadable one is replaced by the next, up to 1 % of all."""
    return SkipBad(DatasetJson(args.data_path, transform))
