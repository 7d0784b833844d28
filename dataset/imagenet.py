"""Class-conditional data: folders of images, and the codes extracted from them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.codes import CodeFolder
from dataset.images import ClassFolders
from dataset.packed import PackedCodes, find_store, is_store, require_same_tokenizer, sibling_105

Source = CodeFolder | PackedCodes


class CodeDataset(Dataset):
    """Extracted codes; items are (codes, label) as int64 tensors, label of shape (1,).

    An image with several views (A > 1) gives one of them, drawn from torch's generator: codes (1, T). Codes below a
    folder `..._ten_crop` that has a sibling `..._ten_crop_105` come from either with probability 0.5.

    `vocab_size` and `num_classes`, when given, bound the codes and labels that are read.

    Attributes:
        source: where the codes are read from.
        second: where those of the second set are, or None; without a `_ten_crop` name the same.
        indices: numbers of the images; item i is the i-th.
        num_tokens: T.
        num_views: A of the first image.
        flip: whether images have several views.
    """

    def __init__(self, source: Source, second: Source | None, vocab_size: int | None, num_classes: int | None) -> None:
        self.source, self.second, self.indices = source, second, source.indices()
        self.vocab_size, self.num_classes = vocab_size, num_classes
        if second is not None and second is not source:
            second.require(self.indices)

    @property
    def flip(self) -> bool:
        return self.num_views > 1

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # the draw is made whenever there is a second set, even if it is the first one again: the order of
        # draws decides what a seeded run reads
        use_second = self.second is not None and torch.rand(1).item() < 0.5
        codes, label = self._draw(self.second if use_second else self.source, self.indices[index])
        return torch.from_numpy(codes), torch.from_numpy(label)

    def _draw(self, source: Source, number: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def view(self, index: int, view: int) -> tuple[Tensor, Tensor]:
        """Codes (T,) of one view of item `index` and its label (), int64; always those of the first set."""
        codes, label = self.source.read(self.indices[index], self.vocab_size, self.num_classes)
        return torch.from_numpy(codes[0, view]), torch.from_numpy(label)[0]


class CustomDataset(CodeDataset):
    """Codes in one file per image. With one view the codes of an item are (1, 1, T).

    Attributes:
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
        folder = CodeFolder(Path(feature_dir), Path(label_dir))
        sibling = folder.sibling_105()
        second = folder if sibling == folder else sibling if sibling.exists() else None
        super().__init__(folder, second, vocab_size, num_classes)
        self.feature_dir, self.label_dir = str(feature_dir), str(label_dir)
        self.feature_files = self.label_files = [f"{index}.npy" for index in self.indices]
        self.aug_feature_dir = str(second.codes) if second else None
        self.aug_label_dir = str(second.labels) if second else None
        first, _ = folder.read(self.indices[0])
        self.num_views, self.num_tokens = first.shape[1:]

    def _draw(self, source: CodeFolder, number: int) -> tuple[np.ndarray, np.ndarray]:
        codes, label = source.read(number, self.vocab_size, self.num_classes)
        if codes.shape[2] != self.num_tokens:
            path = source.codes / f"{number}.npy"
            raise ValueError(f"{path} holds {codes.shape[2]} tokens per view, the first file {self.num_tokens}")
        if codes.shape[1] > 1:
            codes = codes[:, int(torch.randint(0, codes.shape[1], (1,)))]
        return codes, label


class PackedDataset(CodeDataset):
    """Codes in a packed store; every item reads one view of one row of a memory-mapped file.

    Items are those that `CustomDataset` gives for the same codes and the same seed.

    Raises:
        FileNotFoundError: when there is no store in `folder`.
        ValueError: as in `PackedCodes`; when the second set lacks images or has another tokenizer.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None = None, num_classes: int | None = None) -> None:
        source = PackedCodes(folder, "class", vocab_size)
        second: PackedCodes | None = source
        if (sibling := sibling_105(source.folder)) != source.folder:
            second = PackedCodes(sibling, "class", vocab_size) if is_store(sibling) else None
        super().__init__(source, second, vocab_size, num_classes)
        if second is not None:
            require_same_tokenizer(source, second)
        self.num_views, self.num_tokens = source.views, source.tokens

    def _draw(self, source: PackedCodes, number: int) -> tuple[np.ndarray, np.ndarray]:
        if source.views == 1:
            return source.read(number, self.vocab_size, self.num_classes)
        view = int(torch.randint(0, source.views, (1,)))
        return source.read_view(number, view, self.vocab_size, self.num_classes)


def build_imagenet(args: Namespace, transform: Callable) -> ClassFolders:
    """Images of `args.data_path`, one folder per class."""
    return ClassFolders(args.data_path, transform)


def build_imagenet_code(args: Namespace) -> CodeDataset:
    """Codes of `args.image_size` below `args.code_path`, packed or in files, bounded by `args.vocab_size` and
    `args.num_classes` where these are given."""
    limits = getattr(args, "vocab_size", None), getattr(args, "num_classes", None)
    store = find_store(args.code_path, args.image_size)
    if store is not None:
        return PackedDataset(store, *limits)
    folder = CodeFolder.find(args.code_path, args.image_size)
    return CustomDataset(folder.codes, folder.labels, *limits)
