"""One image through the image tokenizer and back.

    python3 tokenizer/tokenizer_image/vq_demo.py --vq-ckpt VQ.pt --image-path photo.jpg --image-size 512

Writes output_vq_demo/photo_tokenizer_image.png, the central square.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.build import add_decode_precision_arg, add_vq_args
from tokenizer.demo import add_demo_args, show
from tokenizer.tokenizer_image.reconstruction_vq_ddp import load
from utils.args import make_parser
from utils.errors import run


def demo(args: argparse.Namespace) -> Path:
    """Write the reconstruction; returns its path."""
    return show(args, load, args.suffix, crop=True)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_demo_args(flags, output_dir="output_vq_demo")
    flags.add_argument("--suffix", default="tokenizer_image", help="end of the result's name")
    add_decode_precision_arg(flags)
    add_vq_args(flags, ckpt_required=True)
    return flags


if __name__ == "__main__":
    run(lambda: demo(parser().parse_args()))
