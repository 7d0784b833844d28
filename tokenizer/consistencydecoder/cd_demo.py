"""One image through OpenAI's consistency decoder and back. Needs the package diffusers.

    python3 tokenizer/consistencydecoder/cd_demo.py --image-path photo.jpg

Writes photo_cd.png beside the image, in the image's size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.consistencydecoder.reconstruction_cd_ddp import load
from tokenizer.demo import add_demo_args, show
from tokenizer.vae.build import add_decoder_args
from utils.args import make_parser
from utils.errors import run


def demo(args: argparse.Namespace) -> Path:
    """Write the reconstruction; returns its path."""
    return show(args, load, "cd", crop=False)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_demo_args(flags, output_dir=None)
    add_decoder_args(flags)
    return flags


if __name__ == "__main__":
    run(lambda: demo(parser().parse_args()))
