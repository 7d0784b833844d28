"""Turning a folder of images into codes, so that the GPT never sees a pixel. `extract_codes_c2i.py` is its command."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dataset.augmentation import extraction_transform
from dataset.build import build_dataset
from dataset.codes import CodeFolder, write_codes
from dataset.images import NumberedImages, collate_numbered
from tokenizer.build import load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import checkpoint
from utils.args import apply_threads, num_workers
from utils.distributed import barrier, get_rank, get_world_size, is_main, process_group, read_launch
from utils.files import read_json, write_json
from utils.progress import progress


def extract(args: argparse.Namespace) -> None:
    """Write the codes of every image under ``args.data_path``; images whose codes are there already are skipped."""
    apply_threads(args)
    with process_group(args.device) as device:
        tokenizer = load_tokenizer(args, device)
        if args.image_size % tokenizer.stride:
            raise ValueError(
                f"--image-size {args.image_size} is not a multiple of the tokenizer's stride {tokenizer.stride}"
            )
        images = build_dataset(args, transform=extraction_transform(args.image_size, args.ten_crop, args.crop_range))
        _claim_folder(Path(args.code_path), args, images)
        _extract_missing(args, tokenizer, NumberedImages(images, args.max_bad_share), device)
        barrier()


def _extract_missing(
    args: argparse.Namespace, tokenizer: VQModel, images: NumberedImages, device: torch.device
) -> None:
    folder = CodeFolder.named(args.code_path, args.dataset, args.image_size)
    mine = range(get_rank(), len(images), get_world_size())
    missing = [index for index in mine if not folder.has(index)]
    loader = DataLoader(
        Subset(images, missing),
        batch_size=args.batch_size,
        collate_fn=collate_numbered,
        num_workers=num_workers(args, read_launch().local_size),
    )
    with progress(len(mine), "image", done=len(mine) - len(missing)) as bar:
        for batch in filter(None, loader):
            indices, crops, labels = batch
            for index, rows, label in zip(indices.tolist(), encode_crops(tokenizer, crops.to(device)), labels.tolist()):
                write_codes(folder, index, rows, label)
            bar.update(len(indices))
    if len(images.bad):
        print(f"{len(images.bad)} images could not be read and have no codes: {images.bad.indices()}", file=sys.stderr)


@torch.no_grad()
def encode_crops(tokenizer: VQModel, crops: Tensor) -> Tensor:
    """Codes of crops (B, A, 3, S, S) in [-1, 1]: int64 (B, A, N), in float32 whatever the surroundings."""
    batch, views = crops.shape[:2]
    with torch.autocast(crops.device.type, enabled=False):
        _, _, (_, _, indices) = tokenizer.encode(crops.flatten(0, 1).float())
    return indices.view(batch, views, -1)


def _claim_folder(folder: Path, args: argparse.Namespace, images: Any) -> None:
    """Note in `folder` how its codes are made, or refuse to mix them with codes that were made otherwise."""
    settings = {
        "data_path": str(Path(args.data_path).resolve()),
        "images": len(images),
        "image_size": args.image_size,
        "crops": f"ten-crop {args.crop_range}" if args.ten_crop else "centre and mirror",
        "tokenizer": args.vq_model,
        "tokenizer_sha256": hashlib.sha256(checkpoint.file_of(args.vq_ckpt).read_bytes()).hexdigest(),
    }
    record = folder / "extraction.json"
    if record.is_file():
        known = read_json(record)
        changed = [name for name in settings if known.get(name) != settings[name]]
        if changed:
            raise ValueError(
                f"{folder} holds codes made with another {changed[0]} ({known.get(changed[0])}, now "
                f"{settings[changed[0]]}); remove the folder or give another --code-path"
            )
    elif is_main():
        write_json(record, {**settings, "classes": list(getattr(images, "classes", []))})
    barrier()
