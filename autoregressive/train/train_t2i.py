"""Train a text-conditional GPT on images or extracted codes with text features.

Images, encoded on the fly by the tokenizer:
    torchrun --nproc_per_node=8 autoregressive/train/train_t2i.py --data-path LISTS --t5-feat-path FEATURES \\
        --vq-ckpt pretrained_models/vq_ds16_t2i.pt --gpt-model GPT-XL --image-size 256
Codes from extract_codes_t2i.py, which cost nothing to read:
    torchrun --nproc_per_node=8 autoregressive/train/train_t2i.py --dataset t2i_code --code-path CODES \\
        --t5-feat-path FEATURES --gpt-model GPT-XL --image-size 256
The second stage starts from the weights of the first:
    ... --image-size 512 --short-t5-feat-path SHORT_FEATURES --init-from pretrained_models/t2i_XL_stage1_256.pt

Ctrl-C saves and stops; the same command continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.train.arguments import add_text_data_args, add_training_args
from autoregressive.train.recipe import train
from tokenizer.build import add_vq_args
from utils.args import make_parser
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_text_data_args(flags.add_argument_group("data"), "t2i")
    add_vq_args(flags)
    add_training_args(flags, gpt_type="t2i", image_size=384)
    return flags


if __name__ == "__main__":
    run(lambda: train(parser().parse_args()))
