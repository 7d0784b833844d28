"""From a checkpoint to a row of a results table: draw a set of pictures, compare it with a reference, note everything.

    python3 autoregressive/sample/evaluate_c2i.py --reference VIRTUAL_imagenet256_labeled.npz --gpt-model GPT-L \
        --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt --image-size 384 --cfg-scale 2.0

All flags of sample_c2i_ddp.py; scripts/autoregressive/evaluate_c2i.sh starts it on all GPUs. Started again, drawing
goes on where it stopped. The pictures are measured as evaluations/c2i/evaluator.py does it: FID and its companions with
the Inception weights, KD-lite0 and FD-lite0 without them. Each evaluation adds one row to --table, and to the .md
beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.evaluation import evaluate_checkpoint
from evaluations.networks import add_feature_args
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command: those of sample_c2i_ddp.py, and what to measure."""
    flags = sample_c2i_ddp.parser()
    flags.description = __doc__
    group = flags.add_argument_group("evaluation")
    group.add_argument("--reference", required=True, help="real pictures: npz or folder of PNGs")
    group.add_argument("--table", default="results/c2i.csv", help="the table that gets a row")
    group.add_argument("--eval-batch-size", type=int, default=64, help="pictures at once in the feature network")
    add_feature_args(flags)
    return flags


if __name__ == "__main__":
    run(lambda: evaluate_checkpoint(parser().parse_args(), vars(sample_c2i_ddp.parser().parse_args([]))))
