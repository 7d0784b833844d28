"""Extract the codes of a folder of images sorted by class, for training the GPT.

    python3 autoregressive/train/extract_codes_c2i.py --data-path IMAGES --code-path CODES --vq-ckpt VQ.pt
    torchrun --nproc_per_node=8 autoregressive/train/extract_codes_c2i.py ... --ten-crop --crop-range 1.1

Writes a packed store, CODES/imagenet256_packed; with --layout files CODES/imagenet256_codes/{i}.npy and
CODES/imagenet256_labels/{i}.npy, i counting the images in sorted order. Started again after an interruption, also with
another number of processes, it extracts what is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.train.extraction import add_crop_args, add_extraction_args, extract
from tokenizer.build import add_vq_args
from utils.args import add_bad_images_arg, add_runtime_args, add_seed_arg, make_parser
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    data = flags.add_argument_group("data")
    data.add_argument("--data-path", required=True, help="images, one folder for each class")
    data.add_argument("--code-path", required=True, help="folder to write the codes to")
    data.add_argument(
        "--dataset",
        choices=["imagenet", "coco", "openimage", "pexels"],
        default="imagenet",
        help="layout of the images, and prefix of what is written",
    )
    data.add_argument("--image-size", type=int, default=256, help="edge of the crops in pixels")
    add_bad_images_arg(data)
    add_crop_args(data, "the image and its mirror")
    add_extraction_args(data)
    add_vq_args(flags, ckpt_required=True)
    add_runtime_args(flags)
    add_seed_arg(flags)
    flags.add_argument("--debug", action="store_true", help="accepted for old command lines: one process needs no flag")
    return flags


if __name__ == "__main__":
    run(lambda: extract(parser().parse_args()))
