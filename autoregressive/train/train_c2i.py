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

from autoregressive.build import add_gpt_args
from autoregressive.train.recipe import train
from utils.args import add_optimizer_args, add_run_args, add_runtime_args, add_seed_arg, add_wandb_args, make_parser
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
    data = flags.add_argument_group("data")
    data.add_argument("--code-path", required=True, help="folder that extract_codes_c2i.py wrote")
    data.add_argument("--val-code-path", help="codes of held-out images: report their likelihood")
    data.add_argument("--val-images", type=int, help="of these so many, spread evenly; default: all")
    data.add_argument("--dataset", default="imagenet_code", help="how the codes are stored")
    data.add_argument("--vocab-size", type=int, default=16384, help="codes in the tokenizer's codebook")
    add_gpt_args(flags)
    dropout = flags.add_argument_group("dropout")
    dropout.add_argument("--dropout-p", type=float, default=0.1, help="residual and FFN dropout")
    dropout.add_argument("--token-dropout-p", type=float, default=0.1, help="dropout of the embedded sequence")
    dropout.add_argument(
        "--drop-path-rate",
        type=float,
        default=0.0,
        help="stochastic depth at the last layer; above 0 it replaces --dropout-p",
    )
    dropout.add_argument("--class-dropout-prob", type=float, default=0.1, help="labels replaced by the null class")
    add_optimizer_args(flags, epochs=300, global_batch_size=256)
    add_run_args(flags, "results")
    add_wandb_args(flags)
    add_runtime_args(flags)
    add_seed_arg(flags)
    return flags


if __name__ == "__main__":
    run(lambda: train(parser().parse_args()))
