"""COCO, or any other flat folder of images."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.images import is_image_name, read_rgb


class SingleFolderDataset(Dataset):
    """The images directly in `directory`, sorted by name; items are (image, tensor(0)).

    Sub-folders and files without an image extension are left out.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds no images.
    """

    def __init__(self, directory: str | Path, transform: Callable | None = None) -> None:
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"there is no folder {directory}; expected one with image files in it")
        files = (path for path in Path(directory).iterdir() if is_image_name(path.name) and path.is_file())
        self.image_paths = [str(path) for path in sorted(files)]
        if not self.image_paths:
            raise ValueError(f"no image files directly in {directory}")
        self.directory, self.transform = directory, transform

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        image = read_rgb(self.image_paths[index])
        return self.transform(image) if self.transform else image, torch.tensor(0)


def build_coco(args: Namespace, transform: Callable) -> SingleFolderDataset:
    """The images of the flat folder `args.data_path`."""
    return SingleFolderDataset(args.data_path, transform)
