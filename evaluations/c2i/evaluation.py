"""Compare a set of samples with a reference: FID, sFID, Inception Score, precision, recall, and what they mean."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluations.bias import bootstrap_interval, frechet_at_infinity
from evaluations.c2i import lite0_evaluation
from evaluations.features import FeatureNetwork
from evaluations.inception import Inception
from evaluations.inception_weights import find_weights, identify
from evaluations.measuring import HowToMeasure, Measured, measure, measure_reference, reference_cache
from evaluations.metrics import NEIGHBOURS, SPLIT_SIZE, frechet_distance_between, precision_recall
from evaluations.provenance import provenance, warnings
from utils.distributed import get_world_size, is_main, process_group
from utils.files import write_atomic, write_json

RESIZE = "to 299x299 by TensorFlow-1 bilinear interpolation (no half-pixel centres, no antialiasing), in the network"
FID_NAMES = {"fid": "FID", "sfid": "sFID"}
OTHER_NAMES = {"fid": "Frechet distance of unknown weights, not FID", "sfid": "sFrechet distance of unknown weights"}


def evaluate(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the command does; every process calls it. Rank 0 prints, writes the text and JSON, and returns the JSON.

    Raises:
        FileNotFoundError, ValueError: for files that cannot be compared.
    """
    if args.features == "lite0":
        return _evaluate_lite0(args)
    with process_group(args.device) as device:
        weights = find_weights(args.weights)
        network = load_network(args.backend, weights, device)
        how = HowToMeasure(network, device, args.batch_size, args.shuffle_seed)
        started = time.perf_counter()
        _say("computing reference batch activations...")
        reference = measure_reference(args.ref_batch, how, None if args.no_cache else reference_cache())
        _say("computing/reading reference batch statistics...")
        looked_from = time.perf_counter()
        _say("computing sample batch activations...")
        samples = measure(args.sample_batch, how, "samples")
        looked = time.perf_counter() - looked_from
        _say("computing/reading sample batch statistics...")
        if reference is None or samples is None:  # not rank 0
            return None
        report = _report(args, network, reference, samples)
        report["network"]["weights"] = str(weights)
        report["network"]["weights_sha256"] = identify(weights).sha256
        report["run"] |= {
            "device": str(device),
            "sample_images_per_second": samples.facts.pictures / looked,
            "seconds": time.perf_counter() - started,
        }
        write_report(report, text_path(args.sample_batch), json_path(args), not args.no_txt)
        return report


def _evaluate_lite0(args: argparse.Namespace) -> dict[str, Any] | None:
    from evaluations.lite0 import Lite0  # an optional package

    with process_group(args.device) as device:
        report = lite0_evaluation.compare(args, Lite0(device), device)
        if report is not None:
            _say(f"network: {report['network']['label']}")
            text = text_path(args.sample_batch)
            places = [text.with_name(text.name.removesuffix(".txt") + end) for end in (".lite0.txt", ".lite0.json")]
            write_report(report, places[0], Path(args.json or places[1]), not args.no_txt)
    return report


def load_network(backend: str, weights: Path, device: torch.device) -> FeatureNetwork:
    """The Inception of a backend: "torch" or "tensorflow"."""
    if backend == "torch":
        return Inception(weights, device)
    from evaluations.inception_tensorflow import TensorFlowInception  # nobody else needs TensorFlow

    return TensorFlowInception(weights, device)


def _report(
    args: argparse.Namespace, network: FeatureNetwork, reference: Measured, samples: Measured
) -> dict[str, Any]:
    origins = provenance(args.ref_batch), provenance(args.sample_batch)
    found = warnings(reference.facts, samples.facts, *origins) + _doubts(network, reference, samples)
    _say(f"reference: {_described(reference, 'statistics stored in the file')}")
    _say(f"samples: {_described(samples, 'STATISTICS STORED IN THE FILE')}; labels {origins[1].labels}; "
         f"resized {origins[1].resized}")  # fmt: skip
    _say(f"network: {network.label}; pictures resized {RESIZE}")
    for warning in found:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    _say("Computing evaluations...")
    metrics, spread = compute_metrics(reference, samples, args.half_distances)
    names = FID_NAMES if network.comparable else OTHER_NAMES
    lines = {
        "Inception Score": metrics["inception_score"],
        names["fid"]: metrics["fid"],
        names["sfid"]: metrics["sfid"],
        "Precision": metrics["precision"],
        "Recall": metrics["recall"],
    }
    return {
        "metrics": lines,
        "inception_score_splits": {"size": SPLIT_SIZE, "shuffle_seed": args.shuffle_seed, **spread},
        "neighbours": NEIGHBOURS,
        "distances": "float16" if args.half_distances else "float32",
        "bias": estimate_bias(args, reference, samples),
        "comparable_with_published_fid": network.comparable,
        "reference": asdict(reference.facts) | {"kind": origins[0].kind, "settings": origins[0].settings},
        "samples": asdict(samples.facts) | asdict(origins[1]),
        "network": {"label": network.label, "backend": args.backend, "resize": RESIZE},
        "warnings": found,
        "run": {
            "command": sys.argv,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "processes": get_world_size(),
            "batch_size": args.batch_size,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def compute_metrics(
    reference: Measured, samples: Measured, half_distances: bool = False
) -> tuple[dict[str, float], dict[str, Any]]:
    """The five numbers, and the Inception Score's number of splits and standard deviation over them."""
    scores = samples.score.scores()  # type: ignore[union-attr]
    precision, recall = precision_recall(reference.features, samples.features, half=half_distances)
    metrics = {
        "inception_score": scores.mean().item(),
        "fid": frechet_distance_between(reference.pool, samples.pool),
        "sfid": frechet_distance_between(reference.spatial, samples.spatial),  # type: ignore[arg-type]
        "precision": precision,
        "recall": recall,
    }
    return metrics, {"splits": len(scores), "deviation": scores.std(correction=0).item()}


def estimate_bias(args: argparse.Namespace, reference: Measured, samples: Measured) -> dict[str, Any]:
    """What --fid-infinity and --bootstrap ask for."""
    estimates: dict[str, Any] = {}
    if args.fid_infinity:
        least = min(args.fid_infinity_from, len(samples.features) // 2)
        found = frechet_at_infinity(reference.pool, samples.features, least=least)
        estimates["infinity"] = {**found._asdict(), "from": least}
    if args.bootstrap:
        found = bootstrap_interval(reference.pool, samples.features, args.bootstrap)
        estimates["bootstrap"] = {**found._asdict(), "repeats": args.bootstrap}
    return estimates


def _doubts(network: FeatureNetwork, reference: Measured, samples: Measured) -> list[str]:
    """Warnings that follow from the numbers of pictures and from the weights."""
    found = []
    if not network.comparable:
        found.append(f"{network.label}: not the published file, so the distances are no FID and compare with nothing")
    width = len(samples.pool.mean)
    few = [what for what, of in (("reference", reference), ("samples", samples))
           if of.facts.pictures <= width and not of.facts.stored_statistics]  # fmt: skip
    if few:
        found.append(f"{' and '.join(few)}: at most {width:,} pictures, so FID is rank-deficient and biased upward")
    if samples.facts.pictures < SPLIT_SIZE:
        found.append(f"fewer than {SPLIT_SIZE:,} samples: the Inception Score is of one short split, and too low")
    if samples.facts.stored_statistics:
        found.append("FID and sFID are those of the statistics stored in the sample file, not of its pictures")
    return found


def _described(of: Measured, stored: str) -> str:
    facts = of.facts
    digest = f"sha256 {facts.sha256[:16]}, " if facts.sha256 else ""
    size = f"{facts.resolution[1]}x{facts.resolution[0]}"
    return (
        f"{facts.path} ({digest}{facts.pictures:,} pictures {size}{', ' + stored if facts.stored_statistics else ''})"
    )


def metric_lines(report: dict[str, Any]) -> list[str]:
    """The established lines: name, colon, number."""
    return [f"{name}: {value}" for name, value in report["metrics"].items()]


def write_report(report: dict[str, Any], text: Path, json: Path, write_text: bool = True) -> None:
    """Print the metrics, and write them to `text` and everything to `json`."""
    lines = metric_lines(report)
    _say("\n".join(lines))
    bias = report["bias"]
    if "infinity" in bias:
        found = bias["infinity"]
        _say(f"FID at infinitely many samples: {found['distance']} +- {found['error']} (from N >= {found['from']:,})")
    if "bootstrap" in bias:
        found = bias["bootstrap"]
        _say(f"FID, 95% bootstrap interval: {found['low']} to {found['high']} ({found['repeats']} repeats)")
    if write_text:
        _say(f"writing to {text}")
        write_atomic(text, lambda file: file.write(("\n".join(lines) + "\n").encode()))
    write_json(json, report)
    _say(f"everything that was compared: {json}")


def text_path(samples: str | Path) -> Path:
    """The established place of the text: the npz with another suffix; for a folder, beside it."""
    return Path(str(samples).rstrip("/").removesuffix(".npz") + ".txt")


def json_path(args: argparse.Namespace) -> Path:
    """--json, else beside the text. (NAME.json holds the settings of the samples.)"""
    text = text_path(args.sample_batch)
    return Path(args.json) if args.json else text.with_name(text.name.removesuffix(".txt") + ".evaluation.json")


def _say(line: str) -> None:
    if is_main():
        print(line, flush=True)
