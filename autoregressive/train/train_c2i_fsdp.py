"""Train a large GPT whose weights, gradients and optimizer states are sharded over all processes (FSDP2).

    torchrun --nproc_per_node=8 autoregressive/train/train_c2i_fsdp.py --code-path CODES --image-size 384 \\
        --gpt-model GPT-3B
On several machines, sharded within each and copied across:
    torchrun --nnodes=4 --nproc_per_node=8 ... autoregressive/train/train_c2i_fsdp.py ... --data-parallel hsdp
Text-conditional models, with the data flags of train_t2i.py:
    ... --gpt-type t2i --dataset t2i_code --code-path CODES --t5-feat-path FEATURES

Ctrl-C saves and stops; the same command continues, also with another number of processes.
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
    add_text_data_args(flags.add_argument_group("data"), "imagenet_code")
    add_vq_args(flags)
    add_training_args(flags, gpt_type="c2i", data_parallel="fsdp", wandb_project="c2i_fsdp")
    flags.add_argument("--gpt-resume", dest="gpt_ckpt", help="established name of --gpt-ckpt: folder of a step")
    flags.set_defaults(cls_token_num=None)  # 1 for a class, 120 for a text
    return flags


if __name__ == "__main__":
    run(lambda: train(parser().parse_args()))
