"""Train a class-conditional GPT on extracted codes.

One process (CPU or GPU):
    python3 autoregressive/train/train_c2i.py --code-path CODES --image-size 256 --gpt-model GPT-B
All GPUs of a machine, or several machines:
    torchrun --nproc_per_node=8 autoregressive/train/train_c2i.py --code-path CODES --image-size 256 --gpt-model GPT-L

Ctrl-C saves and stops; the same command continues.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from autoregressive.train.arguments import add_code_args, add_training_args
from autoregressive.train.recipe import train
from tokenizer.build import add_vq_args
from utils.args import make_parser
from utils.errors import run
from utils.optim import adamw, decay_groups


def creat_optimizer(
    model: torch.nn.Module,
    weight_decay: float,
    learning_rate: float,
    betas: tuple[float, float],
    logger: logging.Logger,
) -> torch.optim.AdamW:
    """The established name for AdamW with decay on tensors of two or more dimensions alone."""
    groups = decay_groups(model.named_parameters(), weight_decay)
    for group, what in zip(groups, ("decayed", "non-decayed")):
        count = sum(p.numel() for p in group["params"])
        logger.info(f"num {what} parameter tensors: {len(group['params'])}, with {count:,} parameters")
    return adamw(groups, learning_rate, betas, next(model.parameters()).device)


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_code_args(flags.add_argument_group("data"), "imagenet_code", required=True)
    add_vq_args(flags)
    add_training_args(flags, gpt_type="c2i")
    return flags


if __name__ == "__main__":
    run(lambda: train(parser().parse_args()))
