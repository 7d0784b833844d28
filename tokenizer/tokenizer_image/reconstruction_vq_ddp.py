"""Reconstruct a folder of images with the image tokenizer, and measure it.

One process (CPU or GPU):
    python3 tokenizer/tokenizer_image/reconstruction_vq_ddp.py --data-path IMAGES --vq-ckpt VQ.pt
All GPUs of a machine:
    torchrun --nproc_per_node=8 tokenizer/tokenizer_image/reconstruction_vq_ddp.py --data-path IMAGES --vq-ckpt VQ.pt

Writes FOLDER/000000.png and so on, FOLDER.npz for the evaluator, FOLDER_results.txt with PSNR and SSIM as published
tables give them, and FOLDER_results.json with the correct ones beside them. Started again, it continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from tokenizer.build import add_decode_precision_arg, add_vq_args, load_tokenizer
from tokenizer.reconstruction import (
    Autoencoder,
    add_reconstruction_args,
    code_autoencoder,
    reconstruct_data_set,
)
from utils.args import make_parser
from utils.errors import run


def load(args: argparse.Namespace, device: torch.device) -> Autoencoder:
    """The tokenizer of --vq-ckpt."""
    model = load_tokenizer(args, device)
    facts = {"vq_model": args.vq_model, "decode_precision": args.decode_precision}
    return Autoencoder(
        args.vq_model,
        model.stride,
        code_autoencoder(model, device, args.decode_precision),
        facts,
        weights={"vq_sha256": args.vq_ckpt},
        codebook=f"-codebook-size-{model.config.codebook_size}-dim-{model.config.codebook_embed_dim}",
        model=model,
    )


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_reconstruction_args(flags, npz_order="index")
    flags.add_argument(
        "--image-size-eval", type=int, help="measure and save at this size; the default is 256, or --image-size if less"
    )
    flags.add_argument(
        "--antialias",
        action="store_true",
        help="shrink to --image-size-eval with antialiasing; without, as for the published 384 -> 256 numbers",
    )
    add_decode_precision_arg(flags)
    add_vq_args(flags, ckpt_required=True)
    return flags


if __name__ == "__main__":
    run(lambda: reconstruct_data_set(parser().parse_args(), load))
