"""How a text-to-image evaluation runs; `evaluation.py` is its command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from evaluations.clip_score import Clip, clip_folder
from evaluations.distance import distance_names
from evaluations.features import FeatureNetwork, PictureStatistics, feature_statistics, frechet, rank_share
from evaluations.t2i.pictures import Generated, SquarePictures, generated_pictures, reference_pictures
from utils.args import apply_threads, num_workers
from utils.distributed import is_main, process_group, read_launch, sum_over_ranks
from utils.files import write_atomic, write_json
from utils.progress import progress

SCORES = "score.txt"


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Measure, print and write what `evaluation.py`'s flags ask for; returns the scores by their printed names.

    Raises:
        ValueError: wrong values, folders that do not fit together, or weights that are nowhere to be found.
    """
    for name in ("how_many", "eval_res", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, found {getattr(args, name)}")
    if args.clip_model4eval == "WO" and not args.ref_dir:
        raise ValueError("nothing to measure: --clip_model4eval WO leaves out the CLIP score, no --ref_dir the FID")
    apply_threads(args)
    with process_group(args.device) as device:
        generated = generated_pictures(args.fake_dir, args.how_many)
        references = reference_pictures(args.ref_dir, args.ref_data, args.ref_type) if args.ref_dir else []
        if is_main():
            print(f"{len(generated):,} generated pictures, {len(references):,} real ones")
        scores, facts = {}, {"generated": len(generated), "references": len(references), "eval_res": args.eval_res}
        if args.clip_model4eval != "WO":
            pairs = generated[: args.how_many]
            clip = Clip(clip_folder(args.clip_model4eval, args.clip_weights), device)
            scores["CLIP score"] = clip_score(args, clip, pairs, device)
            facts |= {"clip": f"{args.clip_model4eval} ({clip.label})", "pairs": len(pairs)}
        if references:
            network = _network(args, device)
            name = f"{distance_names(network)[1]}_{args.eval_res}px"
            scores[name] = _frechet(args, network, references, [picture.path for picture in generated])
            facts |= {"features": network.label, "preprocessing": "centre square, Lanczos to eval_res"}
        if is_main():
            _report(Path(args.fake_dir), scores, facts)
        return scores


def clip_score(args: argparse.Namespace, clip: Clip, pairs: Sequence[Generated], device: torch.device) -> float:
    """Mean cosine of pictures and captions, over all processes."""
    share = rank_share(len(pairs))
    captions = [pairs[i].caption for i in share]
    total, done = torch.zeros(1, dtype=torch.float64, device=device), 0
    for pictures in _batches(args, [pair.path for pair in pairs], "CLIP"):
        total += clip.cosines(pictures, captions[done : done + len(pictures)]).sum()
        done += len(pictures)
    return sum_over_ranks(total).item() / len(pairs)


def _network(args: argparse.Namespace, device: torch.device) -> FeatureNetwork:
    if args.features == "lite0":
        from evaluations.lite0 import Lite0  # timm takes seconds

        return Lite0(device)
    from evaluations.clean_inception import CleanInception
    from evaluations.inception import Inception
    from evaluations.inception_weights import find_weights

    return CleanInception(Inception(find_weights(args.weights), device))


def _frechet(
    args: argparse.Namespace, network: FeatureNetwork, references: Sequence[Path], generated: Sequence[Path]
) -> float:
    return frechet(_statistics(args, network, references, "real"), _statistics(args, network, generated, "generated"))


def _statistics(
    args: argparse.Namespace, network: FeatureNetwork, paths: Sequence[Path], what: str
) -> PictureStatistics:
    return feature_statistics(network, _batches(args, paths, what), first=rank_share(len(paths)).start)


def _batches(args: argparse.Namespace, paths: Sequence[Path], what: str) -> Iterator[Tensor]:
    """This process's share of the pictures, in batches, with a progress bar over all."""
    share = Subset(SquarePictures(paths, args.eval_res), rank_share(len(paths)))
    workers = num_workers(args, read_launch().local_size)
    with progress(len(share), "image", what=what) as bar:
        for batch in DataLoader(share, args.batch_size, num_workers=workers if len(share) > args.batch_size else 0):
            yield batch
            bar.update(len(batch))


def _report(folder: Path, scores: dict[str, float], facts: dict[str, object]) -> None:
    lines = [f"{name}: {value}" for name, value in scores.items()]
    print("\n".join(lines))
    for name, value in facts.items():
        print(f"  {name}: {value}")
    write_atomic(folder / SCORES, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
    versions = {name: version(name) for name in ("torch", "pillow", "transformers")}
    write_json(folder / "scores.json", {"scores": scores, **facts, "versions": versions})
