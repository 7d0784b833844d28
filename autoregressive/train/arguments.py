"""Flags that the commands which train a GPT share."""

from __future__ import annotations

import argparse

from autoregressive.build import add_gpt_args
from autoregressive.train.parallel import add_parallel_args
from evaluations.networks import CHOICES
from utils.args import (
    add_bad_images_arg,
    add_optimizer_args,
    add_run_args,
    add_runtime_args,
    add_seed_arg,
    add_wandb_args,
)
from utils.guard import add_guard_args
from utils.precision import FULL_PRECISION, HALF_PRECISION


def add_training_args(
    parser: argparse.ArgumentParser,
    *,
    gpt_type: str,
    image_size: int = 256,
    data_parallel: str = "ddp",
    wandb_project: str | None = None,
) -> None:
    """The model and how it is trained; the data flags are the commands' own."""
    add_gpt_args(parser, gpt_type, image_size)
    start = parser.add_argument_group("start")
    start.add_argument(
        "--init-from",
        help="begin with the weights of this checkpoint, at step 0 and with a fresh optimizer; --gpt-ckpt continues",
    )
    start.add_argument("--init-from-ema", action="store_true", help="take its averaged weights, where it has them")
    _add_dropout_args(parser)
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--sample-images", type=int, default=16, help="with --vq-ckpt: draw so many at validations")
    pictures.add_argument("--sample-cfg-scale", type=float, default=2.0, help="their guidance scale")
    _add_eval_args(parser)
    precisions = FULL_PRECISION + HALF_PRECISION
    add_optimizer_args(parser, epochs=300, global_batch_size=256, precisions=precisions)
    parser.add_argument("--ema-decay", type=float, default=0.9999, help="memory of --ema; about 1 / (1 - decay) steps")
    add_parallel_args(parser, data_parallel)
    add_guard_args(parser)
    add_run_args(parser, "results")
    add_wandb_args(parser, wandb_project)
    add_runtime_args(parser)
    add_seed_arg(parser)
    data = ("code_path", "data_path", "val_code_path", "t5_feat_path", "short_t5_feat_path", "vq_ckpt")
    parser.set_defaults(**{name: None for name in data if parser.get_default(name) is None})


def _add_eval_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation of samples")
    group.add_argument(
        "--eval-samples",
        type=int,
        default=0,
        help="with --vq-ckpt: at validations draw so many pictures, always from the same seeds, and report their "
        "distance to real ones; under the averaged weights, where there are some. 0: none",
    )
    group.add_argument("--eval-reference", help="the real pictures: an npz or a folder of PNGs, as val_ddp.py writes")
    group.add_argument(
        "--eval-features",
        choices=[name for name in CHOICES if name != "none"],
        default="auto",
        help="auto: FID where the Inception weights are on this machine, else KD-lite0 and FD-lite0",
    )
    group.add_argument("--eval-weights", help="the frozen Inception graph classify_image_graph_def.pb")


def _add_dropout_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dropout")
    group.add_argument("--dropout-p", type=float, default=0.1, help="residual and FFN dropout")
    group.add_argument("--token-dropout-p", type=float, default=0.1, help="dropout of the embedded sequence")
    group.add_argument(
        "--drop-path-rate",
        "--drop-path",
        type=float,
        default=0.0,
        help="stochastic depth at the last layer; above 0 it replaces --dropout-p",
    )
    group.add_argument(
        "--class-dropout-prob", type=float, default=0.1, help="conditions replaced by none, for guidance"
    )


def add_text_data_args(group: argparse._ArgumentGroup, dataset: str) -> None:
    """Images or codes with text features."""
    group.add_argument("--data-path", help="t2i: folder of .jsonl lists of images, which are encoded on the fly")
    group.add_argument("--t5-feat-path", help="text features of the lists, from language/extract_t5_feature.py")
    group.add_argument("--short-t5-feat-path", help="features of short captions, read for 30 %% of the samples")
    add_bad_images_arg(group)
    add_code_args(group, dataset)


def add_code_args(group: argparse._ArgumentGroup, dataset: str, required: bool = False) -> None:
    """Extracted codes."""
    group.add_argument("--code-path", required=required, help="folder that the code extraction wrote")
    group.add_argument("--val-code-path", help="codes of held-out images: report their likelihood")
    group.add_argument("--val-images", type=int, help="of these so many, spread evenly; default: all")
    group.add_argument("--dataset", default=dataset, help="imagenet_code, t2i (images) or t2i_code")
    group.add_argument("--vocab-size", type=int, default=16384, help="codes in the tokenizer's codebook")
