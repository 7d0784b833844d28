"""Write the centre-cropped originals of a data set: the reference that reconstructions are compared with for rFID.

    python3 tokenizer/validation/val_ddp.py --data-path IMAGES
    torchrun --nproc_per_node=8 tokenizer/validation/val_ddp.py --data-path IMAGES

Writes SAMPLE_DIR/val_imagenet/000000.png and so on, and SAMPLE_DIR/val_imagenet.npz. Started again, it continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.reconstruction import add_reconstruction_args, copy_data_set
from utils.args import make_parser
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_reconstruction_args(flags, npz_order="shuffled", padding=False)
    return flags


if __name__ == "__main__":
    run(lambda: copy_data_set(parser().parse_args()))
