"""Two sets of pictures in the features of lite0, for machines without the Inception weights: never an FID."""

from __future__ import annotations

import argparse
import datetime
import sys
from dataclasses import asdict
from typing import Any

import torch

from evaluations.distance import distance_names, distances
from evaluations.features import FeatureNetwork, PictureStatistics
from evaluations.measuring import Facts, HowToMeasure, check_count, hash_of, look
from evaluations.metrics import frechet_distance_of_features, precision_recall
from evaluations.picture_sets import open_pictures
from evaluations.provenance import provenance
from utils.distributed import get_world_size, is_main


def compare(args: argparse.Namespace, network: FeatureNetwork, device: torch.device) -> dict[str, Any] | None:
    """The report of --ref_batch and --sample_batch in the features of `network`; rank 0 gets it.

    Statistics that stand in an npz are of Inception features and are not looked at.
    """
    how = HowToMeasure(network, device, args.batch_size)
    reference, samples = (_look(path, how, what) for path, what in ((args.ref_batch, "reference"),
                                                                    (args.sample_batch, "samples")))  # fmt: skip
    if not is_main():
        return None
    return {
        "metrics": measures(reference, samples),
        "bias": {},
        "comparable_with_published_fid": network.comparable,
        "reference": asdict(_facts(args.ref_batch)),
        "samples": asdict(_facts(args.sample_batch)) | asdict(provenance(args.sample_batch)),
        "network": {"label": network.label},
        "warnings": [],
        "run": {
            "command": sys.argv,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "processes": get_world_size(),
            "torch": torch.__version__,
        },
    }


def measures(reference: PictureStatistics, samples: PictureStatistics) -> dict[str, float]:
    """Distances, precision and recall, and the Frechet distance between the halves of the reference as its floor."""
    kernel, frechet = distance_names(reference)
    precision, recall = precision_recall(reference.features, samples.features)
    name = kernel.removeprefix("KD-")
    return {
        **distances(reference, samples),
        f"{frechet} between halves of the reference": _floor(reference),
        f"Precision-{name}": precision,
        f"Recall-{name}": recall,
    }


def _floor(reference: PictureStatistics) -> float:
    order = torch.randperm(reference.count, generator=torch.Generator().manual_seed(0))
    features = reference.features[order.to(reference.features.device)]
    return frechet_distance_of_features(*features.tensor_split(2))


def _look(path: str, how: HowToMeasure, what: str) -> PictureStatistics:
    pictures = open_pictures(path)
    check_count(pictures)
    return look(pictures, how, what)


def _facts(path: str) -> Facts:
    count, height, width, _ = open_pictures(path).shape
    return Facts(str(path), hash_of(path), count, (height, width), False)
