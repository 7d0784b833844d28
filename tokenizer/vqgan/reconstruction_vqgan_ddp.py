"""Reconstruct a folder of images with a VQGAN of taming-transformers, and measure it.

    python3 tokenizer/vqgan/reconstruction_vqgan_ddp.py --data-path IMAGES --vqgan vqgan_imagenet_f16_16384
    torchrun --nproc_per_node=8 tokenizer/vqgan/reconstruction_vqgan_ddp.py --data-path IMAGES

Output as in tokenizer/tokenizer_image/reconstruction_vq_ddp.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from tokenizer.build import add_decode_precision_arg
from tokenizer.reconstruction import (
    Autoencoder,
    add_reconstruction_args,
    code_autoencoder,
    reconstruct_data_set,
)
from tokenizer.vqgan.build import add_vqgan_args, load_vqgan, vqgan_checkpoint
from utils.args import make_parser
from utils.errors import run


def load(args: argparse.Namespace, device: torch.device) -> Autoencoder:
    """The VQGAN of --vqgan."""
    model = load_vqgan(args, device)
    through = code_autoencoder(model, device, args.decode_precision)
    weights = {"vqgan_sha256": vqgan_checkpoint(args)}
    return Autoencoder(args.vqgan, model.stride, through, {"decode_precision": args.decode_precision}, weights)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_reconstruction_args(flags, npz_order="shuffled")
    add_decode_precision_arg(flags)
    add_vqgan_args(flags, default="vqgan_imagenet_f16_16384")
    return flags


if __name__ == "__main__":
    run(lambda: reconstruct_data_set(parser().parse_args(), load))
