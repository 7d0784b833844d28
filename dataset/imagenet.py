"""Class-conditional data: folders of images, and the codes extracted from them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.codes import CodeFolder
from dataset.images import ClassFolders


class CustomDataset(Dataset):
    """Extracted codes; items are (codes, label) as int64 tensors, label of shape (1,).

    An image with several views (A > 1) gives one of them, drawn from torch's generator: codes (1, T). With
    one view the codes are (1, 1, T). When `feature_dir` lies in a folder `..._ten_crop` that has a sibling
    `..._ten_crop_105`, each item comes from either with probability 0.5.

    `vocab_size` and `num_classes`, when given, bound the codes and labels that are read.

    Attributes:
        flip: whether images have several views.
        feature_dir, label_dir: the folders of codes and labels.
        aug_feature_dir, aug_label_dir: those of the second set, or None; without a `_ten_crop` name the same.
        feature_files, label_files: file names; item i is the i-th, in numeric order.

    Raises:
        FileNotFoundError: when a folder is missing or empty.
        ValueError: when the folders do not hold the same images; on reading, when a file is unreadable, has a
            wrong shape, dtype or value, or another number of tokens than the first.
    """

    def __init__(
        self,
        feature_dir: str | Path,
        label_dir: str | Path,
        vocab_size: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.folder = CodeFolder(Path(feature_dir), Path(label_dir))
        self.feature_dir, self.label_dir = str(feature_dir), str(label_dir)
        self.vocab_size, self.num_classes = vocab_size, num_classes
        self.indices = self.folder.indices()
        self.feature_files = self.label_files = [f"{index}.npy" for index in self.indices]
        self.second = self._second_folder()
        self.aug_feature_dir = str(self.second.codes) if self.second else None
        self.aug_label_dir = str(self.second.labels) if self.second else None
        first, _ = self.folder.read(self.indices[0])
        self.flip, self.num_tokens = first.shape[1] > 1, first.shape[2]

    def _second_folder(self) -> CodeFolder | None:
        sibling = self.folder.sibling_105()
        if sibling == self.folder:
            return self.folder
        if not sibling.exists():
            return None
        sibling.require(self.indices)
        return sibling

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # the draw is made whenever there is a second folder, even if it is the first one again: the order of
        # draws decides which files a seeded run reads
        use_second = self.second is not None and bool(torch.rand(1) < 0.5)
        folder = self.second if use_second else self.folder
        codes, label = folder.read(self.indices[index], self.vocab_size, self.num_classes)
        if codes.shape[2] != self.num_tokens:
            path = folder.codes / self.feature_files[index]
            raise ValueError(f"{path} holds {codes.shape[2]} tokens per view, the first file {self.num_tokens}")
        if codes.shape[1] > 1:
            codes = codes[:, int(torch.randint(0, codes.shape[1], (1,)))]
        return torch.from_numpy(codes), torch.from_numpy(label)


def build_imagenet(args: Namespace, transform: Callable) -> ClassFolders:
    """Images of `args.data_path`, one folder per class."""
    return ClassFolders(args.data_path, transform)


def build_imagenet_code(args: Namespace) -> CustomDataset:
    """Codes of `args.image_size` below `args.code_path`, bounded by the vocabulary and classes in `args`."""
    folder = CodeFolder.find(args.code_path, args.image_size)
    vocab_size, num_classes = getattr(args, "vocab_size", None), getattr(args, "num_classes", None)
    return CustomDataset(folder.codes, folder.labels, vocab_size, num_classes)
