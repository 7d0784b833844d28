"""What a network sees in pictures, gathered into statistics: in batches, on any number of processes.

A `FeatureNetwork` turns pictures into features. `feature_statistics` runs it over batches and keeps sums only, so the
memory does not depend on the number of pictures (unless the features themselves are asked for, which precision and
recall need). `frechet` compares two such statistics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from evaluations.metrics import (
    SPLIT_SIZE,
    FeatureStatistics,
    ScoreStatistics,
    frechet_distance_between,
)
from utils.distributed import gather_objects, gather_rows, get_rank, get_world_size, group_device, sum_over_ranks


class FeatureNetwork(Protocol):
    """Anything that turns pictures into features.

    `label` is what reports print: the network's name and a hash of its weights. `comparable` says whether a Frechet
    distance between its "pool" features may be called FID.
    """

    label: str
    comparable: bool

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        """Features of uint8 pictures (N, H, W, 3) in 0..255, on the network's own device.

        "pool" (N, D) float32; where the network has them "spatial" (N, S) float32 for sFID, and "probabilities" (N, C)
        for the Inception Score.
        """
        ...


def check_pictures(pictures: Tensor) -> None:
    """Raise ValueError unless `pictures` are uint8 (N, H, W, 3)."""
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != torch.uint8:
        raise ValueError(f"pictures must be uint8 (N, H, W, 3), found {pictures.dtype} {tuple(pictures.shape)}")


@dataclass
class PictureStatistics:
    """What is known of a set of pictures. `features` (count, D) float32 are kept on request, in the pictures' order."""

    label: str
    comparable: bool
    count: int = 0
    pool: FeatureStatistics = field(default_factory=FeatureStatistics)
    spatial: FeatureStatistics | None = None
    score: ScoreStatistics | None = None
    features: Tensor | None = None


def rank_share(count: int) -> range:
    """The numbers in 0 .. count - 1 that are this process's: consecutive, so that all ranks in order give all."""
    rank, size = get_rank(), get_world_size()
    each, left = divmod(count, size)
    first = rank * each + min(rank, left)
    return range(first, first + each + (rank < left))


@torch.inference_mode()
def feature_statistics(
    network: FeatureNetwork,
    batches: Iterable[Tensor],
    *,
    first: int = 0,
    keep_features: bool = False,
    split_size: int = SPLIT_SIZE,
    split_order: Tensor | None = None,
) -> PictureStatistics:
    """Statistics of all pictures in `batches`, each uint8 (n, H, W, 3), together with those of all other processes.

    Every process calls this with its own share of the pictures and gets the whole result. With several processes,
    `first` is the number of the share's first picture (``rank_share(count).start``): it decides to which split of the
    Inception Score a picture belongs. `split_order` (count,) moves picture i to the place ``split_order[i]`` for that.

    Raises:
        ValueError: when there are no pictures at all, or the network gives features that are not finite.
    """
    result = PictureStatistics(network.label, network.comparable)
    kept: list[Tensor] = []
    for pictures in batches:
        seen = network(pictures)
        places = torch.arange(first + result.count, first + result.count + len(pictures))
        _take_in(result, seen, (places if split_order is None else split_order[places]) // split_size)
        if keep_features:
            kept.append(seen["pool"])
    _merge_over_ranks(result)
    if keep_features:
        width = len(result.pool.mean)
        result.features = gather_rows(torch.cat(kept) if kept else torch.zeros(0, width, device=group_device()))
    return result


def _take_in(result: PictureStatistics, seen: dict[str, Tensor], splits: Tensor) -> None:
    result.pool.update(seen["pool"])
    if "spatial" in seen:
        result.spatial = result.spatial or FeatureStatistics()
        result.spatial.update(seen["spatial"])
    if "probabilities" in seen:
        result.score = result.score or ScoreStatistics()
        result.score.update(seen["probabilities"], splits)
    result.count += len(splits)


def _merge_over_ranks(result: PictureStatistics) -> None:
    """Add up what the processes have seen. A process without pictures learns the shapes from the others."""
    shapes: dict[str, tuple[int, ...]] = {}
    for found in gather_objects(_shapes(result)):
        for name, shape in found.items():
            shapes[name] = max(shapes.get(name, shape), shape)  # the score's table is as long as the longest
    if "pool" not in shapes:
        raise ValueError("statistics need pictures, found none")
    if get_world_size() == 1:
        return
    result.pool = _sum_statistics(result.pool, shapes["pool"][0])
    if "spatial" in shapes:
        result.spatial = _sum_statistics(result.spatial or FeatureStatistics(), shapes["spatial"][0])
    if "score" in shapes:
        result.score = _sum_scores(result.score, shapes["score"])
    result.count = result.pool.count


def _shapes(result: PictureStatistics) -> dict[str, tuple[int, ...]]:
    if result.count == 0:
        return {}
    shapes = {"pool": tuple(result.pool.mean.shape)}
    if result.spatial is not None:
        shapes["spatial"] = tuple(result.spatial.mean.shape)
    if result.score is not None:
        shapes["score"] = tuple(result.score.table.shape)
    return shapes


def _sum_statistics(own: FeatureStatistics, width: int) -> FeatureStatistics:
    device = own.mean.device if own.count else group_device()
    total = int(sum_over_ranks(torch.tensor(own.count, device=device)))
    if total <= width:  # few rows are kept as they are
        result = FeatureStatistics()
        result.update(gather_rows(own.rows if own.count else torch.zeros(0, width, device=device)))
        return result
    zeros = torch.zeros(width, width, dtype=torch.float64, device=device)
    count, mean, scatter = own.moments() if own.count else (0, zeros[0], zeros)
    common = sum_over_ranks(mean * count) / total
    shift = mean - common
    return FeatureStatistics.from_moments(total, common, sum_over_ranks(scatter + count * torch.outer(shift, shift)))


def _sum_scores(own: ScoreStatistics | None, shape: tuple[int, ...]) -> ScoreStatistics:
    device = own.table.device if own else group_device()
    table = torch.zeros(shape, dtype=torch.float64, device=device)
    if own:
        table[: len(own.table)] = own.table
    return ScoreStatistics(sum_over_ranks(table))


def frechet(reference: PictureStatistics, samples: PictureStatistics, which: str = "pool") -> float:
    """Squared Frechet distance between two sets of pictures in the features `which` ("pool" or "spatial").

    Raises:
        ValueError: when the sets were seen by different networks or lack these features.
    """
    if reference.label != samples.label:
        raise ValueError(f"the reference was seen by {reference.label}, the samples by {samples.label}")
    first, second = getattr(reference, which), getattr(samples, which)
    if first is None or second is None:
        raise ValueError(f"{reference.label} has no {which} features")
    return frechet_distance_between(first.gaussian(), second.gaussian())
