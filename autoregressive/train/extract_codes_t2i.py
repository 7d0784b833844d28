"""Extract the codes of the images in caption lists, for training the text-conditional GPT.

    python3 autoregressive/train/extract_codes_t2i.py --data-path LISTS --code-path CODES --vq-ckpt VQ.pt
    torchrun --nproc_per_node=8 autoregressive/train/extract_codes_t2i.py ... --data-start 0 --data-end 99

LISTS holds .jsonl files with an `image_path` on each line. Writes a packed store with an index of (list, line),
CODES/t2i512_packed or, for a piece of the lists, CODES/t2i512_00000-00099_packed; with --layout files
CODES/{list}/{line}.npy. Started again after an interruption, it extracts what is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.train.extraction import add_crop_args, add_extraction_args, extract_captions
from tokenizer.build import add_vq_args
from utils.args import add_bad_images_arg, add_lists_args, add_runtime_args, add_seed_arg, make_parser
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    data = flags.add_argument_group("data")
    add_lists_args(data)
    data.add_argument("--code-path", required=True, help="folder to write the codes to")
    data.add_argument("--image-size", type=int, default=512, help="edge of the centre crop in pixels")
    add_crop_args(data, "the centre crop")
    add_bad_images_arg(data)
    add_extraction_args(data)
    add_vq_args(flags, ckpt_required=True)
    add_runtime_args(flags)
    add_seed_arg(flags)
    return flags


if __name__ == "__main__":
    run(lambda: extract_captions(parser().parse_args()))
