"""Turning images into codes, so that the GPT never sees a pixel.

The commands are `extract_codes_c2i.py` (folders of images by class) and `extract_codes_t2i.py` (caption lists).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dataset.augmentation import eval_transform, extraction_transform
from dataset.build import build_dataset
from dataset.codes import CodeFolder, caption_codes_path, write_array, write_codes
from dataset.images import NumberedImages, SkipBad, collate_numbered
from dataset.lists import CaptionLists, list_files
from dataset.packed import SUFFIX, sha256_of
from dataset.packing import SHARD_SIZE, PackedWriter
from dataset.t2i import ListedImages
from tokenizer.build import load_tokenizer
from tokenizer.coding import ENCODE_PRECISIONS, GPU_BATCH, ImageEncoder
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import checkpoint
from utils.args import apply_threads, num_workers
from utils.claim import claim
from utils.distributed import barrier, broadcast_object, get_rank, get_world_size, is_main, process_group, read_launch
from utils.progress import progress


def add_extraction_args(group: argparse._ArgumentGroup) -> None:
    """How images are encoded and codes are stored."""
    group.add_argument(
        "--batch-size", type=int, default=16, help=f"images of a batch; a GPU encodes up to {GPU_BATCH} crops at once"
    )
    group.add_argument(
        "--encode-precision",
        choices=ENCODE_PRECISIONS,
        default="exact",
        help="on a GPU, tf32 lets convolutions use TF32: faster, and some codes are others; the share of equal ones in "
        "the first batch is printed. On a CPU both are the same",
    )
    group.add_argument(
        "--layout",
        choices=["packed", "files"],
        default="packed",
        help="packed: few memory-mapped files, a quarter of the size; files: one int64 .npy per image",
    )
    group.add_argument(
        "--shard-size",
        type=int,
        default=SHARD_SIZE,
        help="images in a packed file, at most; at least 16 files are made",
    )


def add_crop_args(group: argparse._ArgumentGroup, without: str) -> None:
    """How many views of each image; `without` says what there is without --ten-crop."""
    group.add_argument("--ten-crop", action="store_true", help=f"ten crops of each image; without: {without}")
    group.add_argument(
        "--crop-range", type=float, default=1.1, help="size the ten crops are cut from, over --image-size"
    )


def extract(args: argparse.Namespace) -> None:
    """Write the codes of every image under ``args.data_path``; what is there already is skipped."""
    apply_threads(args)
    with process_group(args.device) as device:
        tokenizer = load_fitting_tokenizer(args, device)
        images = build_dataset(args, transform=extraction_transform(args.image_size, args.ten_crop, args.crop_range))
        job = Job(args, tokenizer, NumberedImages(images, args.max_bad_share), device)
        settings = {
            "data_path": str(Path(args.data_path).resolve()),
            "images": len(images),
            "crops": f"ten-crop {args.crop_range}" if args.ten_crop else "centre and mirror",
            **_common_settings(args, device),
            "classes": list(getattr(images, "classes", [])),
        }
        if args.layout == "files":
            _claim_folder(args, settings)
            folder = CodeFolder.named(args.code_path, args.dataset, args.image_size)
            job.write_files(folder.has, partial(write_codes, folder))
        else:
            store = Path(args.code_path, f"{args.dataset}{args.image_size}{SUFFIX}")
            settings |= {"dataset": args.dataset, "source_sha256": _source_hash(_image_paths(images))}
            job.write_store(store, "class", 10 if args.ten_crop else 2, settings)
        barrier()


def extract_captions(args: argparse.Namespace) -> None:
    """Write the codes of every image in the lists of ``args.data_path``; what is there already is skipped."""
    apply_threads(args)
    with process_group(args.device) as device:
        tokenizer = load_fitting_tokenizer(args, device)
        records = CaptionLists(list_files(args.data_path, args.data_start, args.data_end))
        if args.ten_crop and args.layout == "files":
            raise ValueError("--ten-crop needs --layout packed: a file of the established layout holds one view")
        views = transforms.Compose([eval_transform(args.image_size), partial(torch.unsqueeze, dim=0)])
        if args.ten_crop:
            views = extraction_transform(args.image_size, args.ten_crop, args.crop_range)
        job = Job(args, tokenizer, NumberedImages(ListedImages(records, views), args.max_bad_share), device)
        settings = {
            "data_path": str(Path(args.data_path).resolve()),
            "crops": f"ten-crop {args.crop_range}" if args.ten_crop else "centre",
            **_common_settings(args, device),
        }
        if args.layout == "files":
            _claim_folder(args, settings)
            file = partial(_caption_file, args.code_path, records)
            job.write_files(lambda i: file(i).is_file(), lambda i, codes, line: write_array(file(i), codes))
        else:
            stems = {stem: number for number, stem in enumerate(records.stems)}
            settings |= {"stems": records.stems, "source_sha256": _source_hash(records.files)}
            store = Path(args.code_path, f"t2i{args.image_size}{_piece(args)}{SUFFIX}")
            count = 10 if args.ten_crop else 1
            job.write_store(store, "caption", count, settings, lambda i: (stems[records[i].stem], records[i].line))
        barrier()


def _caption_file(code_path: str, records: CaptionLists, index: int) -> Path:
    return caption_codes_path(code_path, records[index].stem, records[index].line)


def _piece(args: argparse.Namespace) -> str:
    """Part of a store's name: which piece of the sorted lists it is made of, so that jobs can share a folder."""
    if args.data_start is None and args.data_end is None:
        return ""
    return f"_{args.data_start or 0:05d}-{'end' if args.data_end is None else f'{args.data_end:05d}'}"


def load_fitting_tokenizer(args: argparse.Namespace, device: torch.device) -> VQModel:
    """The tokenizer of `args`.

    Raises:
        ValueError: when its stride does not divide the image size.
    """
    tokenizer = load_tokenizer(args, device)
    if args.image_size % tokenizer.stride:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of the tokenizer's stride {tokenizer.stride}"
        )
    return tokenizer


class Encoded(NamedTuple):
    """One batch: the images that were asked for, and those of them that could be read."""

    asked: Sequence[int]
    indices: list[int]
    codes: np.ndarray  # int64 (B, A, N)
    labels: np.ndarray  # int64 (B,)


class Job:
    """This process's share of an extraction."""

    def __init__(
        self, args: argparse.Namespace, tokenizer: VQModel, images: NumberedImages, device: torch.device
    ) -> None:
        self.args, self.tokenizer, self.images, self.device = args, tokenizer, images, device
        self.encode = ImageEncoder(tokenizer, precision=args.encode_precision)

    def encoded(self, batches: list[Sequence[int]]) -> Iterator[Encoded]:
        """The codes of each of `batches`, in this order."""
        loader = DataLoader(
            self.images,
            batch_sampler=batches,
            collate_fn=collate_numbered,
            num_workers=num_workers(self.args, read_launch().local_size),
            pin_memory=self.device.type == "cuda",
        )
        compare = self.args.encode_precision != "exact"
        for asked, batch in zip(batches, loader):
            if batch is None:
                yield Encoded(asked, [], np.empty(0), np.empty(0))
                continue
            indices, crops, labels = batch
            crops = crops.to(self.device, non_blocking=True)
            codes = self.encode.of_views(crops).long()
            if compare:
                compare = False
                self._compare(crops, codes)
            yield Encoded(asked, indices.tolist(), codes.cpu().numpy(), labels.numpy())

    def _compare(self, crops: Tensor, codes: Tensor) -> None:
        """Say how many of the codes (B, A, N) of crops (B, A, 3, S, S) are those of exact arithmetic."""
        share = (encode_crops(self.tokenizer, crops) == codes).double().mean().item()
        print(f"rank {get_rank()}: {share:.2%} of the first {codes.numel():,} codes are the exact ones", flush=True)

    def write_files(self, has: Callable[[int], bool], write: Callable[[int, np.ndarray, int], None]) -> None:
        """One file per image; images for which `has` is true are skipped."""
        mine = range(get_rank(), len(self.images), get_world_size())
        missing = [index for index in mine if not has(index)]
        with progress(len(mine), "image", done=len(mine) - len(missing)) as bar:
            for batch in self.encoded(_chunks(missing, self.args.batch_size)):
                for index, codes, label in zip(batch.indices, batch.codes, batch.labels.tolist()):
                    write(index, codes, label)
                bar.update(len(batch.asked))
        _report_missing(self.images.bad.indices())

    def write_store(
        self,
        folder: Path,
        kind: str,
        views: int,
        settings: dict[str, Any],
        key: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        """A packed store, shard s by rank s modulo the number of ranks; complete shards are skipped.

        `key` gives what is stored beside the codes of an image, in place of its label.
        """
        store = PackedWriter(
            folder,
            kind,
            images=len(self.images),
            views=views,
            tokens=(self.args.image_size // self.tokenizer.stride) ** 2,
            codebook_size=self.tokenizer.config.codebook_size,
            settings=settings,
            shard_size=self.args.shard_size,
        )
        barrier()
        if is_main():
            store.claim()
        barrier()
        mine = range(get_rank(), len(store.shards), get_world_size())
        missing = [shard for shard in mine if not store.has(shard)]
        self._fill(store, missing, sum(len(store.shards[shard]) for shard in mine), key)
        barrier()
        if is_main():
            _report_missing(store.finish()["missing"])

    def _fill(
        self, store: PackedWriter, missing: list[int], images: int, key: Callable[[int], tuple[int, int]] | None
    ) -> None:
        batches = [_chunks(store.shards[shard], self.args.batch_size) for shard in missing]
        results = self.encoded([batch for of_shard in batches for batch in of_shard])
        with progress(images, "image", done=images - sum(len(store.shards[shard]) for shard in missing)) as bar:
            for shard, of_shard in zip(missing, batches):
                rows = store.shards[shard]
                codes = np.zeros((len(rows), *store.shape), dtype=store.dtype)
                companion = np.full((len(rows), 2) if key else len(rows), -1)
                found: list[int] = []
                for batch in (next(results) for _ in of_shard):
                    if batch.indices:
                        places = np.array(batch.indices) - rows.start
                        codes[places] = batch.codes
                        companion[places] = [key(i) for i in batch.indices] if key else batch.labels
                    found += batch.indices
                    bar.update(len(batch.asked))
                store.write(shard, codes, companion, sorted(set(rows) - set(found)))


def _chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def _report_missing(missing: list[int]) -> None:
    if missing:
        print(f"{len(missing)} images could not be read and have no codes: {missing}", file=sys.stderr)


def encode_crops(tokenizer: VQModel, crops: Tensor) -> Tensor:
    """Codes of crops (B, A, 3, S, S) in [-1, 1]: int64 (B, A, N), in exact arithmetic."""
    return ImageEncoder(tokenizer).of_views(crops).long()


def _common_settings(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    reduced = args.encode_precision != "exact" and _tf32_there(device)
    return {
        "image_size": args.image_size,
        "tokenizer": args.vq_model,
        "tokenizer_sha256": broadcast_object(is_main() and sha256_of(checkpoint.file_of(args.vq_ckpt))),
        **({"encode_precision": args.encode_precision} if reduced else {}),  # codes of earlier versions have no note
    }


def _tf32_there(device: torch.device) -> bool:
    return device.type == "cuda"


def _image_paths(images: Dataset) -> list[Path]:
    """The files of an image data set, in its order."""
    images = images.dataset if isinstance(images, SkipBad) else images
    if hasattr(images, "samples"):
        return [Path(path) for path, _ in images.samples]
    return [Path(getattr(images, "data_path", ""), path) for path in images.image_paths]


def _source_hash(paths: Sequence[Path]) -> str:
    """SHA-256 over the names, relative to their common folder, and the sizes of `paths`; made by rank 0 for all."""
    return broadcast_object(is_main() and _hash_listing(paths))


def _hash_listing(paths: Sequence[Path]) -> str:
    digest, root = hashlib.sha256(), os.path.commonpath([path.absolute().parent for path in paths])
    for path in paths:
        size = path.stat().st_size if path.is_file() else -1
        digest.update(f"{path.absolute().relative_to(root).as_posix()}\t{size}\n".encode())
    return digest.hexdigest()


def _claim_folder(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Note in the folder how its codes are made, or refuse to mix them with codes that were made otherwise."""
    claim(Path(args.code_path, "extraction.json"), settings, "codes", "--code-path", unchecked=["classes"])
