"""Reconstruct a folder of images with OpenAI's consistency decoder, and measure it.

    python3 tokenizer/consistencydecoder/reconstruction_cd_ddp.py --data-path IMAGES
    torchrun --nproc_per_node=8 tokenizer/consistencydecoder/reconstruction_cd_ddp.py --data-path IMAGES

Needs the package diffusers. Output as in tokenizer/tokenizer_image/reconstruction_vq_ddp.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from tokenizer.reconstruction import Autoencoder, add_reconstruction_args, reconstruct_data_set
from tokenizer.vae.build import add_decoder_args, latent_autoencoder, load_consistency_decoder
from utils.args import make_parser
from utils.errors import run


def load(args: argparse.Namespace, device: torch.device) -> Autoencoder:
    """The consistency decoder."""
    model = load_consistency_decoder(args.cd_path, device)
    return latent_autoencoder(args, model, "openai-consistencydecoder", {"decoder": args.cd_path})


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_reconstruction_args(flags, npz_order="shuffled")
    add_decoder_args(flags)
    return flags


if __name__ == "__main__":
    run(lambda: reconstruct_data_set(parser().parse_args(), load))
