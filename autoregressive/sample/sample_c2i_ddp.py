"""Draw a set of pictures for evaluation, on any number of processes, into a folder of PNGs and an npz.

    torchrun --nproc_per_node=8 autoregressive/sample/sample_c2i_ddp.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt \
        --vq-ckpt vq_ds16_c2i.pt --image-size 384 --image-size-eval 256 --cfg-scale 2.0

Picture i depends on the checkpoints, the settings, --global-seed and i alone. Started again, the command keeps what is
finished and draws the rest; the npz is the same as without the interruption.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.sample.image_set import sample_image_set
from autoregressive.sample.pipeline import add_model_args
from utils.args import add_seed_arg, make_parser
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    what = flags.add_argument_group("pictures")
    what.add_argument("--num-fid-samples", type=int, default=50000, help="pictures in all")
    what.add_argument(
        "--per-proc-batch-size", type=int, default=32, help="at once, per process; halved if memory is short"
    )
    what.add_argument("--sample-dir", default="samples", help="the folder of the pictures is made in here")
    what.add_argument(
        "--image-size-eval",
        type=int,
        help="edge of the saved pictures, bicubic if it differs from --image-size; the default is 256, "
        "or that of smaller images",
    )
    what.add_argument(
        "--balanced-labels",
        action="store_true",
        help="all classes in turn (50,000 pictures: 50 of each of 1000); the default is random classes",
    )
    what.add_argument("--npz", action=argparse.BooleanOptionalAction, default=True, help="write the npz")
    add_model_args(flags, cfg_scale=1.5, top_k=0)
    add_seed_arg(flags)
    return flags


if __name__ == "__main__":
    run(lambda: sample_image_set(parser().parse_args(), vars(parser().parse_args([]))))
