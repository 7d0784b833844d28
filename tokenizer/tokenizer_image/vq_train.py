"""Train the image tokenizer.

One process (CPU or GPU):
    python3 tokenizer/tokenizer_image/vq_train.py --data-path IMAGES --image-size 256 --vq-model VQ-16
All GPUs of a machine, or several machines:
    torchrun --nproc_per_node=8 tokenizer/tokenizer_image/vq_train.py --data-path IMAGES --image-size 256

Ctrl-C saves and stops; the same command continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.networks import CHOICES
from tokenizer.build import add_vq_args
from tokenizer.tokenizer_image.recipe import train
from utils.args import add_bad_images_arg, add_optimizer_args, add_run_args, add_runtime_args, add_seed_arg, make_parser
from utils.errors import run

DATASETS = ["imagenet", "coco", "openimage", "pexels", "t2i_image", "tars"]


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    data = flags.add_argument_group("data")
    data.add_argument("--data-path", required=True, help="training images, in the layout of --dataset")
    data.add_argument("--data-face-path", help="second folder of lists, for --dataset t2i_image")
    data.add_argument("--val-data-path", help="held-out images: report how well they are reconstructed")
    data.add_argument("--val-images", type=int, default=1000, help="how many of them, at most")
    data.add_argument(
        "--val-features",
        choices=CHOICES,
        default="auto",
        help="their distances too: rFID where Inception's weights are on this machine, else KD- and FD-lite0 where "
        "that package is; none saves the time",
    )
    data.add_argument("--val-weights", help="the frozen Inception graph classify_image_graph_def.pb")
    data.add_argument("--dataset", choices=DATASETS, default="imagenet", help="layout of the images")
    data.add_argument("--image-size", type=int, default=256, help="edge of the square crops in pixels")
    add_bad_images_arg(data)
    add_vq_args(flags)
    flags.add_argument("--finetune", action="store_true", help="with --vq-ckpt: take its weights, count steps from 0")
    _add_codebook_args(flags)
    _add_loss_args(flags)
    add_optimizer_args(flags, epochs=40, global_batch_size=128)
    _add_memory_args(flags)
    flags.set_defaults(weight_decay=0.0)  # what the established trainer in effect used, whatever its flag said
    add_run_args(flags, "results_tokenizer_image")
    add_runtime_args(flags)
    add_seed_arg(flags)
    return flags


def _add_memory_args(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("weights and activations")
    group.add_argument("--ema-decay", type=float, default=0.9999, help="of --ema; less in the first steps")
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute activations twice: less memory, more time"
    )


def _add_codebook_args(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("codebook")
    group.add_argument("--codebook-weight", type=float, default=1.0, help="weight of the codebook's losses")
    group.add_argument("--commit-loss-beta", type=float, default=0.25, help="pull of the encoder towards its codes")
    group.add_argument(
        "--entropy-loss-ratio",
        type=float,
        help="reward for using many codes; the default is 0, with lfq 0.1 and with ibq 0.05",
    )
    group.add_argument(
        "--codebook-init",
        choices=["uniform", "kmeans"],
        default="uniform",
        help="kmeans: start from clusters of the untrained encoder's outputs",
    )
    group.add_argument(
        "--revive-every",
        type=int,
        help="every so many steps, in the first 80%% of training, move unused codes onto data; 0: never, the default "
        "but for --quantizer ema, which has 20",
    )
    group.add_argument("--dropout-p", type=float, default=0.0, help="dropout in the residual blocks")


def _add_loss_args(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("losses")
    group.add_argument("--reconstruction-loss", choices=["l1", "l2", "l1+l2"], default="l2", help="on pixels")
    group.add_argument("--reconstruction-weight", type=float, default=1.0, help="its weight")
    group.add_argument("--gradient-weight", type=float, default=0.0, help="L1 on differences of neighbouring pixels")
    group.add_argument("--perceptual-weight", type=float, default=1.0, help="LPIPS; 0 needs no VGG16 weights")
    group.add_argument("--vgg-path", help="local file of torchvision's VGG16 weights, in place of a download")
    group.add_argument("--disc-weight", type=float, default=0.5, help="adversarial loss; 0 builds no discriminator")
    group.add_argument("--disc-start", type=int, default=20000, help="first step with the adversarial loss")
    group.add_argument("--disc-lr", type=float, help="the discriminator's learning rate; the default is --lr")
    group.add_argument("--disc-type", choices=["patchgan", "stylegan"], default="patchgan", help="discriminator")
    group.add_argument("--disc-layers", type=int, default=3, help="halvings of patchgan; 2 suit images below 64 px")
    group.add_argument("--disc-loss", choices=["hinge", "vanilla", "non-saturating"], default="hinge", help="its loss")
    group.add_argument(
        "--gen-loss", choices=["hinge", "non-saturating"], default="hinge", help="the tokenizer's side of it"
    )
    group.add_argument(
        "--disc-adaptive-weight", action="store_true", help="balance it by gradient norms at the last layer"
    )


if __name__ == "__main__":
    run(lambda: train(parser().parse_args()))
