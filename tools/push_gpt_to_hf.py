"""Put a GPT into the hub's format, and push it to the Hugging Face hub.

    python3 tools/push_gpt_to_hf.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 --repo-id ME/my-gpt
    python3 tools/push_gpt_to_hf.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 --no-push

Writes hf_models/my-gpt with config.json and model.safetensors, which `TransformerHF.from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from autoregressive.build import add_gpt_args, build_gpt, describe_weights
from autoregressive.models.gpt_hf import TransformerHF
from tokenizer.build import add_vq_args
from tools.hub import add_hub_args, publish
from utils import checkpoint
from utils.args import make_parser
from utils.errors import run
from utils.precision import DTYPES


def push(args: argparse.Namespace) -> Path:
    """Save, check and push; returns the folder."""
    if not args.gpt_ckpt:
        raise checkpoint.CheckpointError("--gpt-ckpt is missing: give the GPT's checkpoint")
    with torch.device("meta"):
        config = build_gpt(args, args.codebook_size or 16384).config
    model = TransformerHF(config).eval()
    checkpoint.load_weights(model, args.gpt_ckpt, prefer_ema=args.ema, suggest=describe_weights)
    repo_id = args.repo_id or f"FoundationVision/{args.gpt_model}-{args.image_size}"
    return publish(model.to(DTYPES[args.precision]), repo_id, args)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_gpt_args(flags, image_size=384)
    flags.add_argument("--ema", action="store_true", help="take the averaged weights where the checkpoint has them")
    flags.add_argument("--precision", choices=list(DTYPES), default="bf16", help="format of the stored weights")
    add_vq_args(flags)
    add_hub_args(flags, "FoundationVision/{gpt_model}-{image_size}")
    old = flags.add_argument_group("accepted for old command lines, without effect")
    old.add_argument("--from-fsdp", action="store_true", help="every format is recognised by itself")
    old.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="weights are the same either way"
    )
    old.add_argument("--image-size-eval", type=int, default=256, help="no picture is made")
    return flags


if __name__ == "__main__":
    run(lambda: push(parser().parse_args()))
