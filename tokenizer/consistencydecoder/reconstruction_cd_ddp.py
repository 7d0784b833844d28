"""Reconstruct a folder of images with OpenAI's consistency decoder, and measure it.

    python3 tokenizer/consistencydecoder/reconstruction_cd_ddp.py --data-path IMAGES
    torchrun --nproc_per_node=8 tokenizer/consistencydecoder/reconstruction_cd_ddp.py --data-path IMAGES

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
from tokenizer.vae.build import add_decoder_args, add_latent_args, load_consistency_decoder, stride_of, vae_reconstruct
from utils.args import make_parser
from utils.errors import run


def load(args: argparse.Namespace, device: torch.device) -> Autoencoder:
    """The consistency decoder."""
    model = load_consistency_decoder(args.cd_path, device)
    name = f"openai-consistencydecoder-{args.dataset}-size-{args.image_size}-seed-{args.global_seed}"
    facts = {"decoder": args.cd_path, "sample_latents": args.sample_latents}
    through = partial(vae_reconstruct, model, sample=args.sample_latents, seed=args.global_seed)
    return Autoencoder(name, stride_of(model), through, facts)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_reconstruction_args(flags, npz_order="shuffled")
    add_decoder_args(flags)
    add_latent_args(flags)
    return flags


if __name__ == "__main__":
    run(lambda: reconstruct_data_set(parser().parse_args(), load))
