"""FID, sFID, Inception Score, precision and recall of samples against a reference batch.

    python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz
    torchrun --nproc_per_node=8 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz

Both are npz files with the array arr_0, uint8 (N, H, W, 3), or folders of PNGs. Statistics mu, sigma, mu_s, sigma_s in
an npz take the place of those of its pictures. The numbers go to samples.txt; with everything that they depend on, to
samples.evaluation.json. Generation is compared with VIRTUAL_imagenet256_labeled.npz, a tokenizer's reconstructions with
the originals of the validation set: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.c2i.evaluation import evaluate
from utils.args import apply_threads, make_parser
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("ref_batch", help="the reference: npz or folder")
    flags.add_argument("sample_batch", help="the samples: npz or folder")
    network = flags.add_argument_group("network")
    network.add_argument(
        "--features",
        choices=["inception", "lite0"],
        default="inception",
        help="lite0 needs no download, and prints KD-lite0 and FD-lite0 in place of the FID",
    )
    network.add_argument(
        "--backend",
        choices=["torch", "tensorflow"],
        default="torch",
        help="what runs the network; tensorflow is the reference, and slower to start",
    )
    network.add_argument(
        "--weights",
        "--inception",
        help="the frozen graph classify_image_graph_def.pb; the default is $LLAMAGEN_INCEPTION, then the working "
        "directory, then the cache folder, into which it is downloaded (96 MB)",
    )
    network.add_argument("--batch-size", type=int, default=64, help="pictures at once; changes no result")
    network.add_argument("--device", help="cuda or cpu; the default is a GPU where there is one")
    network.add_argument("--num-threads", type=int, help="CPU threads per process; the default is torch's choice")
    metrics = flags.add_argument_group("metrics")
    metrics.add_argument(
        "--half-distances",
        action="store_true",
        help="measure precision and recall in float16, as the established evaluator does",
    )
    metrics.add_argument(
        "--shuffle-seed",
        type=int,
        help="assign samples to the splits of the Inception Score at random, for samples that are sorted by class",
    )
    metrics.add_argument(
        "--fid-infinity", action="store_true", help="estimate the FID of infinitely many samples (15 more FIDs)"
    )
    metrics.add_argument(
        "--fid-infinity-from", type=int, default=5000, help="the smallest number of samples that it looks at"
    )
    metrics.add_argument(
        "--bootstrap", type=int, default=0, metavar="N", help="95%% interval of the FID from N bootstrap repeats"
    )
    output = flags.add_argument_group("output")
    output.add_argument("--json", help="where the JSON goes; the default is SAMPLES.evaluation.json")
    output.add_argument("--no-txt", action="store_true", help="write no SAMPLES.txt")
    output.add_argument(
        "--no-cache",
        action="store_true",
        help="measure the reference again; else its statistics are kept in $LLAMAGEN_CACHE (~/.cache/llamagen)",
    )
    return flags


def main() -> None:
    args = parser().parse_args()
    apply_threads(args)
    evaluate(args)


if __name__ == "__main__":
    run(main)
