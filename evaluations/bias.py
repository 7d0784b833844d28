"""How far a measured Frechet distance can be trusted: its bias for few samples, and its spread.

A Frechet distance of N samples is too high by about c / N, with a c that depends on the model, so distances of
different N, and even of one N, do not compare models fairly (Chong & Forsyth, 2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from evaluations.metrics import FeatureStatistics, Gaussian, frechet_distance_between

POINTS = 15  # numbers of samples at which the distance is measured
LEAST = 5000  # samples at the first of them


class Extrapolation(NamedTuple):
    """The Frechet distance that infinitely many samples would have, and its standard error from the line's fit."""

    distance: float
    error: float


def frechet_at_infinity(
    reference: Gaussian, features: Tensor, points: int = POINTS, least: int = LEAST, seed: int = 0
) -> Extrapolation:
    """The distance as N goes to infinity: a straight line through distances of N samples, drawn over 1 / N.

    `features` (N, D) are the samples'. At each of `points` sizes between `least` and N, evenly spaced, a random subset
    is taken without replacement (Chong & Forsyth, 2020, with plain random numbers).

    Raises:
        ValueError: when there are fewer than twice `least` samples, too short a line to follow.
    """
    if len(features) < 2 * least or points < 3:
        raise ValueError(
            f"a Frechet distance at infinity needs at least {2 * least} samples and 3 points on the line, found "
            f"{len(features)} and {points}"
        )
    sizes = torch.linspace(least, len(features), points).round().long().tolist()
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for size in sizes:
        chosen = torch.randperm(len(features), generator=generator)[:size].to(features.device)
        distances.append(_distance(reference, features[chosen]))
    return _intercept(1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64))


class Interval(NamedTuple):
    """Where the distance of another set of N samples of the same model would lie, in 95 % of cases."""

    low: float
    high: float
    deviation: float


def bootstrap_interval(reference: Gaussian, features: Tensor, repeats: int = 20, seed: int = 0) -> Interval:
    """A 95 % interval of the distance from samples drawn again, with replacement, `repeats` times.

    Drawing with replacement repeats samples, which raises the distance; the interval is the measured distance plus and
    minus 1.96 standard deviations of the repeats, so it shows the spread of the measurement and not its bias.
    """
    if repeats < 2:
        raise ValueError(f"a bootstrap interval needs at least 2 repeats, found {repeats}")
    generator = torch.Generator().manual_seed(seed)
    count = len(features)
    distances = []
    for _ in range(repeats):
        chosen = torch.randint(count, (count,), generator=generator).to(features.device)
        distances.append(_distance(reference, features[chosen]))
    measured = _distance(reference, features)
    deviation = torch.tensor(distances, dtype=torch.float64).std().item()
    return Interval(measured - 1.96 * deviation, measured + 1.96 * deviation, deviation)


def _distance(reference: Gaussian, features: Tensor) -> float:
    statistics = FeatureStatistics()
    for rows in features.split(2**13):  # bounds the float64 copy
        statistics.update(rows)
    return frechet_distance_between(reference, statistics.gaussian())


def _intercept(x: Tensor, y: Tensor) -> Extrapolation:
    """Where the least-squares line through (x, y) meets x = 0, and the standard error of that."""
    design = torch.stack([torch.ones_like(x), x / x.max()], dim=1)
    inverse = torch.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    variance = (y - design @ coefficients).square().sum() / (len(x) - 2)
    return Extrapolation(coefficients[0].item(), (variance * inverse[0, 0]).sqrt().item())
