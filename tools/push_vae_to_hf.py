"""Put an image tokenizer into the hub's format, and push it to the Hugging Face hub.

    python3 tools/push_vae_to_hf.py --vq-ckpt vq_ds16_c2i.pt --repo-id ME/my-tokenizer
    python3 tools/push_vae_to_hf.py --vq-ckpt vq_ds16_c2i.pt --no-push

Writes hf_models/my-tokenizer with config.json and model.safetensors, which `VQModelHF.from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from tokenizer.build import add_vq_args, build_tokenizer, describe_weights
from tokenizer.tokenizer_image.vq_model_hf import VQModelHF
from tools.hub import add_hub_args, publish, released
from utils import checkpoint
from utils.args import make_parser
from utils.errors import run

FILES = {"VQ-16": "vq_ds16_c2i.pt", "VQ-8": "vq_ds8_c2i.pt"}
REPO = "FoundationVision/vq-ds16-c2i"


def push(args: argparse.Namespace) -> Path:
    """Save, check and push; returns the folder."""
    if not args.vq_ckpt and args.vq_model not in FILES:
        raise ValueError(f"there is no released {args.vq_model}: give --vq-ckpt")
    with torch.device("meta"):
        config = build_tokenizer(args).config
    model = VQModelHF(config).eval()
    checkpoint.load_weights(
        model, args.vq_ckpt or released(FILES[args.vq_model]), prefer_ema=args.ema, suggest=describe_weights
    )
    return publish(model, args.repo_id or REPO, args)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_vq_args(flags)
    flags.add_argument("--ema", action="store_true", help="take the averaged weights where the checkpoint has them")
    add_hub_args(flags, REPO)
    flags.add_argument("--gpt-model", default="GPT-XL", help="accepted for old command lines: no GPT is needed here")
    return flags


if __name__ == "__main__":
    run(lambda: push(parser().parse_args()))
