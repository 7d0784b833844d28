"""Encode the captions of lists, for training the text-conditional GPT.

    python3 language/extract_t5_feature.py --data-path LISTS --t5-path FEATURES --t5-model-path T5_FOLDERS
    torchrun --nproc_per_node=8 language/extract_t5_feature.py ... --data-start 0 --data-end 99

LISTS holds .jsonl files with a `text` list on each line; FEATURES gets one file per caption, {list}/{line}.npy, float32
(1, tokens, width), or with --layout packed a few large files of half the size. Started again after an interruption, it
encodes what is missing. --text-encoder minilm works without a download of T5.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.lists import CAPTION_KEYS
from language.build import add_text_encoder_args
from language.extraction import extract
from utils.args import add_lists_args, add_runtime_args, add_seed_arg, make_parser
from utils.errors import run
from utils.precision import DTYPES


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    data = flags.add_argument_group("data")
    add_lists_args(data)
    data.add_argument("--t5-path", required=True, help="folder to write the features to")
    data.add_argument("--caption-key", choices=list(CAPTION_KEYS), default="blip", help="which caption of a line")
    data.add_argument("--trunc-caption", action="store_true", help="keep what precedes the first full stop")
    data.add_argument(
        "--layout",
        choices=["files", "packed"],
        default="files",
        help="packed needs a folder for each --data-start; tools/convert_features.py converts later",
    )
    data.add_argument("--batch-size", type=int, default=32, help="captions that are encoded at once")
    data.add_argument(
        "--max-bad-share", type=float, default=0.01, help="stop when a larger share of the lines has no caption"
    )
    add_text_encoder_args(flags.add_argument_group("encoder"), "--t5-model-path", "./pretrained_models/t5-ckpt")
    flags.add_argument("--precision", choices=list(DTYPES), default="bf16", help="format of the encoder's weights")
    add_runtime_args(flags)
    add_seed_arg(flags)
    return flags


if __name__ == "__main__":
    run(lambda: extract(parser().parse_args()))
