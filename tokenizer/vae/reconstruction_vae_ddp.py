"""Reconstruct a folder of images with an autoencoder of Stable Diffusion, and measure it.

    python3 tokenizer/vae/reconstruction_vae_ddp.py --data-path IMAGES --vae sd-vae-ft-mse
    torchrun --nproc_per_node=8 tokenizer/vae/reconstruction_vae_ddp.py --data-path IMAGES

Needs the package diffusers. Output as in tokenizer/tokenizer_image/reconstruction_vq_ddp.py.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from tokenizer.reconstruction import Autoencoder, add_reconstruction_args, reconstruct_data_set
from tokenizer.vae.build import add_latent_args, add_vae_args, load_vae, stride_of, vae_reconstruct, vae_source
from utils.args import make_parser
from utils.errors import run


def load(args: argparse.Namespace, device: torch.device) -> Autoencoder:
    """The autoencoder of --vae."""
    source = vae_source(args)
    model = load_vae(source, device)
    name = f"stabilityai-{args.vae}-{args.dataset}-size-{args.image_size}-seed-{args.global_seed}"
    facts = {"vae": source, "sample_latents": args.sample_latents}
    through = partial(vae_reconstruct, model, sample=args.sample_latents, seed=args.global_seed)
    return Autoencoder(name, stride_of(model), through, facts)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_reconstruction_args(flags, npz_order="shuffled")
    add_vae_args(flags)
    add_latent_args(flags)
    return flags


if __name__ == "__main__":
    run(lambda: reconstruct_data_set(parser().parse_args(), load))
