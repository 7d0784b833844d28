"""What is measured of a tokenizer's reconstructions; `evaluate.py` is the command."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset.augmentation import eval_transform
from dataset.build import build_dataset
from evaluations.distance import distances
from evaluations.features import FeatureNetwork, feature_statistics, rank_share
from evaluations.networks import feature_network
from evaluations.picture_sets import PictureSet, open_pictures
from evaluations.render import beside
from tokenizer.nearest import exact_arithmetic
from tokenizer.reconstruction import (
    Autoencoder,
    Load,
    Prefetched,
    eval_size,
    images_and_autoencoder,
    pad_to,
    padded_size,
    reconstruct_data_set,
)
from tokenizer.tokenizer_image.evaluation import code_statistics
from tokenizer.tokenizer_image.lpips import LPIPS
from tokenizer.tokenizer_image.lpips_weights import VGG_FILE
from utils.args import num_workers
from utils.distributed import barrier, is_main, process_group, read_launch, sum_over_ranks
from utils.files import read_json, write_json
from utils.image import resize_bicubic, to_float, to_uint8
from utils.progress import progress
from utils.results_table import append_row, commit_of

_BATCH = 32
_ROOT = Path(__file__).resolve().parents[2]
# The columns of a table that people look at.
SHOWN = [
    "date", "tokenizer", "checkpoint", "data", "images", "size", "rFID", "KD-lite0", "FD-lite0", "PSNR", "SSIM",
    "LPIPS", "codebook usage", "perplexity", "commit",
]  # fmt: skip


def evaluate(args: argparse.Namespace, load: Load) -> dict[str, Any]:
    """Reconstruct, measure, print and write what `evaluate.py` says; returns the measures by name.

    Raises:
        ValueError: as `reconstruct_data_set`, or for weights that were asked for and are not there.
    """
    with process_group(args.device) as device, torch.inference_mode():
        network, perceptual = feature_network(args.features, device, args.weights), find_lpips(args.vgg_path, device)
        folder = reconstruct_data_set(args, load)
        pictures = open_pictures(folder)
        with images_and_autoencoder(args, load) as (_, images, count, autoencoder):
            compared = _compare(args, device, images, pictures, count, autoencoder, perceptual)
        quality = read_json(beside(folder, "_results.json"))
        measures = {"PSNR": quality["correct"]["psnr"], "SSIM": quality["correct"]["ssim"], **compared}
        if network is not None:
            measures |= _distances(args, network, pictures, count)
        if is_main():
            facts = {
                "images": count,
                "features": network.label if network else None,
                "established": quality["established"],
                "settings": quality["settings"],
            }
            _report(args, folder, measures, facts)
        barrier()
    return measures


def find_lpips(path: str | None, device: torch.device) -> LPIPS | None:
    """LPIPS with the VGG16 weights at `path` or in torch's hub cache; None without them, nothing is downloaded."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if path is None and not cached.is_file():
        if is_main():
            print(f"LPIPS skipped: it needs torchvision's VGG16 weights, by --vgg-path or at {cached}", flush=True)
        return None
    return LPIPS(weights_path=path or cached).to(device)


def _compare(
    args: argparse.Namespace,
    device: torch.device,
    images: Prefetched,
    pictures: PictureSet,
    count: int,
    autoencoder: Autoencoder,
    perceptual: nn.Module | None,
) -> dict[str, float]:
    """LPIPS of pictures and originals one by one, and what the codes of the originals show."""
    share, size = rank_share(count), eval_size(args)
    counts = torch.zeros(autoencoder.model.quantize.n_e, dtype=torch.float64, device=device)
    distance, first = torch.zeros(1, dtype=torch.float64, device=device), share.start
    with progress(len(share), "image", what="comparing") as bar:
        for batch in pictures.batches(share, _BATCH):
            originals = images.get(range(first, first + len(batch))).to(device)
            counts += _code_counts(autoencoder, pad_to(originals, padded_size(args, autoencoder.stride)), len(counts))
            if perceptual is not None:
                if size != args.image_size:
                    originals = resize_bicubic(originals, size, args.antialias)
                seen, reference = to_float(batch.to(device)), to_float(to_uint8(originals))
                distance += perceptual(reference, seen).double().sum()
            first += len(batch)
            bar.update(len(batch))
    found = {"LPIPS": sum_over_ranks(distance).item() / count} if perceptual is not None else {}
    use = code_statistics(sum_over_ranks(counts))
    return found | {"codebook usage": use["codebook_usage"], "perplexity": use["perplexity"]}


def _code_counts(autoencoder: Autoencoder, images: Tensor, codes: int) -> Tensor:
    with exact_arithmetic(images.device.type):
        indices = autoencoder.model.encode(images)[2][2]
    return torch.bincount(indices.flatten(), minlength=codes)


def _distances(args: argparse.Namespace, network: FeatureNetwork, pictures: PictureSet, count: int) -> dict[str, float]:
    """rFID, or the distances of another network: of the reconstructions to originals cropped to the size of both."""
    share, size = rank_share(count), eval_size(args)
    originals = build_dataset(args, transform=eval_transform(size))
    with Prefetched(originals, max(1, num_workers(args, read_launch().local_size))) as images:
        reference = feature_statistics(
            network, _counted(_cropped(images, share), len(share), "originals"), first=share.start, keep_features=True
        )
    batches = _counted(pictures.batches(share, _BATCH), len(share), "reconstructions")
    samples = feature_statistics(network, batches, first=share.start, keep_features=True)
    found = distances(reference, samples)
    return {{"FID": "rFID", "KID": "rKID", "KID std": "rKID std"}.get(name, name): v for name, v in found.items()}


def _cropped(images: Prefetched, numbers: range) -> Iterator[Tensor]:
    for first in range(numbers.start, numbers.stop, _BATCH):
        yield to_uint8(images.get(range(first, min(first + _BATCH, numbers.stop))))


def _counted(batches: Iterator[Tensor], total: int, what: str) -> Iterator[Tensor]:
    with progress(total, "image", what=what) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _report(args: argparse.Namespace, folder: Path, measures: dict[str, Any], facts: dict[str, Any]) -> None:
    for name, value in measures.items():
        print(f"{name}: {value}")
    if facts["features"]:
        print(f"  features: {facts['features']}; {facts['images']:,} images at {eval_size(args)} pixels")
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(_ROOT),
        "torch": torch.__version__,
    }
    target = beside(folder, "_evaluation.json")
    write_json(target, {"measures": measures, **facts, **run})
    print(f"everything that was compared: {target}")
    if args.table:
        row = {
            **run,
            "tokenizer": args.vq_model,
            "checkpoint": f"{Path(args.vq_ckpt).name} {facts['settings']['vq_sha256'][:16]}",
            "data": args.data_path,
            "images": facts["images"],
            "size": eval_size(args),
            **measures,
            "features": facts["features"],
            "settings": facts["settings"],
            "folder": str(folder),
        }
        print(f"added to {append_row(args.table, row, SHOWN)}")
