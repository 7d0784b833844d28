"""Compare sampling settings: draw a set of pictures for each, measure its distance to real ones, write table and plot.

    python3 autoregressive/sample/sweep_c2i.py --sweep cfg-scale=1.0,1.5,2.0,3.0 cfg-schedule=constant,linear \
        --reference val_imagenet.npz --num-fid-samples 5000 --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt \
        --vq-ckpt vq_ds16_c2i.pt --results sweep.csv

All other flags are those of sample_c2i_ddp.py and hold for every set. Writes RESULTS (.csv), and the same as .md and as
a plot (.png). Started again, it keeps the rows and the pictures that are there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.sweep import Row, arguments_of, rows_of_grid, rows_of_table, sweep
from evaluations.networks import add_feature_args, feature_network
from utils.args import make_parser
from utils.distributed import process_group
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """The flags that the sampler does not have."""
    flags = make_parser(__doc__)
    what = flags.add_argument_group("sweep")
    what.add_argument("--sweep", nargs="+", default=[], metavar="FLAG=VALUES", help="all combinations of these")
    what.add_argument("--table", help="a CSV or JSON list of settings instead, one set per row")
    what.add_argument("--reference", required=True, help="npz or folder of real pictures, of the saved size")
    what.add_argument("--results", default="sweep.csv", help="the table of results")
    add_feature_args(flags)
    return flags


def main(own: argparse.Namespace, common: list[str]) -> None:
    """Find the rows and the network, and sweep."""
    rows = rows_of_grid(own.sweep) if own.sweep else rows_of_table(own.table) if own.table else []
    if not rows or (own.sweep and own.table):
        raise ValueError("say what is compared: --sweep FLAG=VALUE,VALUE or --table FILE")
    sampler = sample_c2i_ddp.parser()

    def parse(row: Row) -> argparse.Namespace:
        return sampler.parse_args([*common, *arguments_of(row)])

    with process_group(parse(rows[0]).device) as device:
        network = feature_network(own.features, device, own.weights)
        if network is None:
            raise ValueError("a sweep needs features to compare: see --features")
        sweep(own, rows, parse, vars(sampler.parse_args([])), network)


if __name__ == "__main__":
    run(lambda: main(*parser().parse_known_args()))
