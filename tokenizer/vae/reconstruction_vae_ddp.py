"""Reconstruct a folder of images with an autoencoder of Stable Diffusion, and measure it.

    python3 tokenizer/vae/reconstruction_vae_ddp.py --data-path IMAGES --vae sd-vae-ft-mse
    torchrun --nproc_per_node=8 tokenizer/vae/reconstruction_vae_ddp.py --data-path IMAGES

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
from tokenizer.vae.build import VAES, add_vae_args, latent_autoencoder, load_vae
from utils.args import make_parser
from utils.errors import run


def load(args: argparse.Namespace, device: torch.device) -> Autoencoder:
    """The autoencoder of --vae."""
    source = args.vae_path or VAES[args.vae]
    return latent_autoencoder(args, load_vae(source, device), f"stabilityai-{args.vae}", {"vae": source})


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_reconstruction_args(flags, npz_order="shuffled")
    add_vae_args(flags)
    return flags


if __name__ == "__main__":
    run(lambda: reconstruct_data_set(parser().parse_args(), load))
