"""One image through a VQGAN of taming-transformers and back.

    python3 tokenizer/vqgan/taming_vqgan_demo.py --vqgan vqgan_openimage_f8_16384 --image-path photo.jpg

Writes photo_vqgan.png beside the image, in the image's size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.build import add_decode_precision_arg
from tokenizer.demo import add_demo_args, show
from tokenizer.vqgan.build import add_vqgan_args
from tokenizer.vqgan.reconstruction_vqgan_ddp import load
from utils.args import make_parser
from utils.errors import run


def demo(args: argparse.Namespace) -> Path:
    """Write the reconstruction; returns its path."""
    return show(args, load, "vqgan", crop=False)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_demo_args(flags, output_dir=None)
    add_decode_precision_arg(flags)
    add_vqgan_args(flags, default="vqgan_openimage_f8_16384")
    return flags


if __name__ == "__main__":
    run(lambda: demo(parser().parse_args()))
