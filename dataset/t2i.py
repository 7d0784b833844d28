"""Text-to-image data: lists of images with text features stored beside them.

A record's features, n tokens of `caption_dim` numbers, lie in `t5_feat_path`, see `dataset.features`. They are put at
the end of `cls_token_num` rows (left padding), longer ones keep their first tokens.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.codes import CaptionFiles
from dataset.features import FeatureFiles, PackedFeatures, open_features
from dataset.images import BadItems, TooSmall, read_rgb
from dataset.lists import CaptionLists, Record, list_files
from dataset.packed import CaptionCodes, find_stores

SHORT_CAPTION_SHARE = 0.3


def prefix_mask(num_tokens: int, num_padding: int) -> Tensor:
    """Attention mask bool (1, num_tokens, num_tokens), true where row may look at column.

    Causal, with the first `num_padding` columns hidden; every row sees itself, so a padded row only that.
    """
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril_()
    mask[:, :num_padding] = False
    return mask.fill_diagonal_(True)[None]


def left_padded(features: Tensor, num_rows: int) -> Tensor:
    """Features (n, D) as (1, num_rows, D): zeros first, then the first min(n, num_rows) rows."""
    rows = features[:num_rows]
    return torch.nn.functional.pad(rows, (0, 0, num_rows - len(rows), 0))[None]


class CaptionFeatures:
    """The text features of one or two trees; with `short_path`, 30 % of reads (torch's generator) go there.

    Raises:
        FileNotFoundError: when a tree has nothing for one of the lists.
        ValueError: when a packed tree is damaged or of another width than `dim`.
    """

    def __init__(self, path: str | Path, short_path: str | Path | None, stems: list[str], dim: int) -> None:
        self.dim = dim
        self._trees = [_open_for(tree, stems, dim) for tree in filter(None, (path, short_path))]

    def read(self, stem: str, line: int) -> Tensor:
        """The features of one record, float32 (n, dim).

        Raises:
            ValueError: when there are none, or they are damaged, of a wrong shape or not finite.
        """
        use_short = len(self._trees) == 2 and bool(torch.rand(1) < SHORT_CAPTION_SHARE)
        return self._trees[use_short].read(stem, line)


def _open_for(tree: str | Path, stems: list[str], dim: int) -> FeatureFiles | PackedFeatures:
    cure = "extract them with language/extract_t5_feature.py or correct the feature path"
    try:
        features = open_features(tree, dim)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there are no text features of the list {stems[0]!r}: no folder {tree}; {cure}"
        ) from error
    missing = [stem for stem in stems if not features.has_list(stem)]
    if missing:
        raise FileNotFoundError(f"there are no text features of the list {missing[0]!r} in {tree}; {cure}")
    return features


class ListedImages(Dataset):
    """The images of `records`; items are (image, line number). Unreadable ones raise `UnreadableImage`."""

    def __init__(self, records: CaptionLists, transform: Callable | None = None) -> None:
        self.records, self.transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        record = self.records[index]
        image = read_rgb(record.image_file)
        return self.transform(image) if self.transform else image, record.line


class Text2ImgDatasetImg(ListedImages):
    """The images of the lists in `lst_dir` and, after them, of the `*_face.jsonl` lists in `face_lst_dir`."""

    def __init__(self, lst_dir: str | Path, face_lst_dir: str | Path | None, transform: Callable | None) -> None:
        files = list_files(lst_dir)
        if face_lst_dir is not None:
            files += list_files(face_lst_dir, suffix="_face.jsonl")
        super().__init__(CaptionLists(files), transform)


class _CaptionedItems(Dataset):
    """What images and codes with captions have in common: features, mask and the count of bad items."""

    def __init__(self, args: Namespace, stems: list[str], count: int, max_bad_share: float) -> None:
        self.grid_tokens = grid_tokens(args)
        self.text_tokens = getattr(args, "cls_token_num", 120)
        short_path = getattr(args, "short_t5_feat_path", None)
        dim = getattr(args, "caption_dim", 2048)
        self.features = CaptionFeatures(args.t5_feat_path, short_path, stems, dim)
        self.bad = BadItems(count, max_bad_share)
        self.compact = getattr(args, "compact_mask", False)

    def __len__(self) -> int:
        return self.bad.count

    def _item(self, content: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        padding = max(0, self.text_tokens - len(features))
        return content, left_padded(features, self.text_tokens), self._mask(padding), torch.tensor(1)

    def _mask(self, padding: int) -> Tensor:
        if self.compact:
            return torch.arange(self.text_tokens) >= padding
        return prefix_mask(self.text_tokens + self.grid_tokens, padding)

    def _invalid(self, content: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = torch.zeros(1, self.text_tokens, self.features.dim)
        return content, features, self._mask(0), torch.tensor(0)


class Text2ImgDataset(_CaptionedItems):
    """Images with text features; items are (image, features, mask, valid).

    * image: what `transform` makes of the RGB image, (3, S, S).
    * features: float32 (1, cls_token_num, caption_dim), left padded.
    * mask: bool (1, L, L) with L = cls_token_num + tokens of the image, see `prefix_mask`; with `args.compact_mask`
      only which of the text positions hold text, bool (cls_token_num,), from which the rest follows.
    * valid: int64 scalar, 1 or 0. Invalid items (image unreadable or smaller than `args.image_size`, features
      unreadable) are zeros with a causal mask; training leaves them out of its loss.

    `args` has data_path, t5_feat_path, image_size, downsample_size and maybe short_t5_feat_path,
    cls_token_num (120) and caption_dim (2048).

    Raises:
        FileNotFoundError: when lists or feature folders are missing.
        ValueError: on reading, when more than `max_bad_share` of all are unreadable; small ones do not count.
    """

    def __init__(self, args: Namespace, transform: Callable, max_bad_share: float = 0.01) -> None:
        self.records = CaptionLists(list_files(args.data_path))
        super().__init__(args, self.records.stems, len(self.records), max_bad_share)
        self.image_size, self.transform = args.image_size, transform

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if index not in self.bad:
            try:
                return self._read(self.records[index])
            except TooSmall:
                pass
            except ValueError as error:
                self.bad.add(index, error)
        return self._invalid(torch.zeros(3, self.image_size, self.image_size))

    def _read(self, record: Record) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image = self.transform(read_rgb(record.image_file, at_least=self.image_size))
        return self._item(image, self.features.read(record.stem, record.line))


class Text2ImgDatasetCode(_CaptionedItems):
    """Extracted codes with text features; items are (codes, features, mask, valid).

    Codes are int64 (1, T) from the packed stores in `args.code_path`, else from its files
    `{list stem}/{line}.npy`; every record there is an item, lists sorted by name and lines by number. Where
    each image has several views, one is drawn from torch's generator. The rest is as in `Text2ImgDataset`.
    `args.vocab_size`, if there, bounds the codes.

    Attributes:
        num_tokens: T.

    Raises:
        FileNotFoundError: when there are no codes, or no features for one of the lists.
        ValueError: on reading, when more than `max_bad_share` of all items are unreadable.
    """

    def __init__(self, args: Namespace, max_bad_share: float = 0.01) -> None:
        self.vocab_size = getattr(args, "vocab_size", None)
        tokens = self.num_tokens = grid_tokens(args)
        if find_stores(args.code_path):
            self.codes = CaptionCodes(args.code_path, self.vocab_size)
            if self.codes.tokens != tokens:
                raise ValueError(f"{args.code_path} holds {self.codes.tokens} codes an image, expected {tokens}")
        else:
            self.codes = CaptionFiles(args.code_path, tokens)
        self.keys = self.codes.keys
        super().__init__(args, sorted({stem for stem, _ in self.keys}), len(self.keys), max_bad_share)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.view(index, int(torch.randint(self.codes.views, (1,))) if self.codes.views > 1 else 0)

    def view(self, index: int, view: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Item `index` with the codes of one view."""
        if index not in self.bad:
            try:
                return self._item(self.read_codes(index, view)[None], self.features.read(*self.keys[index]))
            except ValueError as error:
                self.bad.add(index, error)
        return self._invalid(torch.zeros(1, self.grid_tokens, dtype=torch.int64))

    def read_codes(self, index: int, view: int = 0) -> Tensor:
        """The codes of one view of item `index` alone, int64 (T,).

        Raises:
            ValueError: when they are damaged or outside the vocabulary.
        """
        return torch.from_numpy(self.codes.read(*self.keys[index], self.vocab_size, view))[0]


def grid_tokens(args: Namespace) -> int:
    """Codes of an image."""
    return (args.image_size // args.downsample_size) ** 2


def build_t2i_image(args: Namespace, transform: Callable) -> Text2ImgDatasetImg:
    """The images of the lists in `args.data_path` and of the face lists in `args.data_face_path`, if any."""
    return Text2ImgDatasetImg(args.data_path, getattr(args, "data_face_path", None), transform)


def build_t2i(args: Namespace, transform: Callable) -> Text2ImgDataset:
    """The images of the lists in `args.data_path` with their text features."""
    return Text2ImgDataset(args, transform, getattr(args, "max_bad_share", 0.01))


def build_t2i_code(args: Namespace) -> Text2ImgDatasetCode:
    """The codes below `args.code_path` with their text features."""
    return Text2ImgDatasetCode(args, getattr(args, "max_bad_share", 0.01))
