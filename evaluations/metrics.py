"""The arithmetic of the generation metrics, on features that a network has already extracted.

FID (Heusel et al., 2017), Inception Score (Salimans et al., 2016), improved precision and recall
(Kynkaanniemi et al., 2019) and kernel distance (Binkowski et al., 2018). Everything takes tensors and gives
tensors or plain floats, on the device of its inputs; statistics are float64 throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3  # k of improved precision and recall
SPLIT_SIZE = 5000  # rows per split of the Inception Score


class Gaussian(NamedTuple):
    """A normal distribution: mean (D,), and a factor (any number of rows, D) with factor^T factor = covariance."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """From a mean (D,) and a symmetric covariance (D, D) of any floating dtype; calculations are float64."""
        mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
        d = mean.numel()
        if (tuple(mean.shape), tuple(covariance.shape)) != ((d,), (d, d)):
            found = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(f"expected a mean (D,) and a covariance (D, D) with one D, found {found}")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("means and covariances must be finite, found NaN or infinity")
        return cls(mean, _square_root(covariance))


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64.

    Each batch is centred on its own mean before it is merged, so that a large common offset costs no digits. The
    memory is that of D x D numbers, however many rows come. The first D rows are kept as they are while there are no
    more: a covariance of so few rows is singular, and only the rows themselves factor it exactly.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None
        self._rows: list[Tensor] | None = []

    def update(self, features: Tensor) -> None:
        """Take in (N, D) features of any floating dtype."""
        _check_features(features)
        if len(features) == 0:
            return
        features = features.detach()
        mean = features.mean(dim=0, dtype=torch.float64)
        centred = features.double() - mean
        self._merge(len(features), mean, centred.T @ centred, [features])

    @classmethod
    def from_moments(cls, count: int, mean: Tensor, scatter: Tensor) -> FeatureStatistics:
        """Statistics of `count` rows from their mean (D,) and scatter (D, D): the sum of outer products about it."""
        result = cls()
        result._merge(count, mean.double(), scatter.double(), None)
        return result

    def moments(self) -> tuple[int, Tensor, Tensor]:
        """Count, mean (D,) and scatter (D, D), float64: what `from_moments` takes."""
        self._demand(1)
        return self.count, self._mean, self._scatter

    def merge(self, other: FeatureStatistics) -> None:
        """Take in what another accumulator has seen, e.g. on another rank."""
        if other.count:
            self._merge(other.count, other._mean, other._scatter, other._rows)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor, rows: list[Tensor] | None) -> None:
        total = self.count + count
        keep = self._rows is not None and rows is not None and total <= len(mean)
        self._rows = [*self._rows, *rows] if keep else None
        if self.count == 0:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        shift = mean - self._mean
        self._mean = self._mean + shift * (count / total)
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.count = total

    @property
    def rows(self) -> Tensor | None:
        """All rows (N, D) that were taken in, while N <= D; None from then on."""
        return torch.cat(self._rows) if self._rows else None

    @property
    def mean(self) -> Tensor:
        """Mean (D,), float64."""
        self._demand(1)
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D), float64: divided by N - 1."""
        self._demand(2)
        return self._scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """The normal distribution with this mean and covariance; exact where the rows are few."""
        self._demand(2)
        if self._rows is None:
            return Gaussian.of(self.mean, self.covariance)
        return Gaussian(self._mean, (self.rows.double() - self._mean) / (self.count - 1) ** 0.5)

    def _demand(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"statistics need at least {least} feature rows, found {self.count}")


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Frechet distance between two Gaussians: |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Takes means (D,) and symmetric covariances (D, D).
    """
    return frechet_distance_between(Gaussian.of(mean1, covariance1), Gaussian.of(mean2, covariance2))


def frechet_distance_of_features(features1: Tensor, features2: Tensor) -> float:
    """The same distance between two feature sets (N1, D) and (N2, D), exact also where N <= D."""
    _check_same_width(features1, features2)
    gaussians = []
    for features in (features1, features2):
        statistics = FeatureStatistics()
        statistics.update(features)
        gaussians.append(statistics.gaussian())
    return frechet_distance_between(*gaussians)


def frechet_distance_between(first: Gaussian, second: Gaussian) -> float:
    """The same distance between two Gaussians.

    The trace of (S1 S2)^(1/2) is the sum of the singular values of F1 F2^T with factors F^T F = S, so no general matrix
    square root is needed and the result is always real.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(f"both Gaussians must have one width, found {len(first.mean)} and {len(second.mean)}")
    trace = torch.linalg.svdvals(first.factor @ second.factor.T).sum()
    spread = first.factor.square().sum() + second.factor.square().sum()
    return ((first.mean - second.mean).square().sum() + spread - 2 * trace).item()


def _square_root(covariance: Tensor) -> Tensor:
    # Clamped at zero only: small eigenvalues are many, and a relative threshold moves the FID.
    values, vectors = torch.linalg.eigh(covariance)
    return vectors.mul(values.clamp(min=0).sqrt()) @ vectors.T


def class_probabilities(features: Tensor, weights: Tensor) -> Tensor:
    """Class probabilities (N, C), float64, from features (N, D) and classifier weights (D, C), no bias."""
    return (features.double() @ weights.double()).softmax(dim=1)


class ScoreStatistics:
    """What the Inception Score needs of class probabilities that arrive in batches, one row of sums per split.

    `table` is (splits, 2 + C) float64: rows seen, sum of p log p, sums of the class probabilities. Tables of several
    processes add up.
    """

    def __init__(self, table: Tensor | None = None) -> None:
        self.table = table

    def update(self, probabilities: Tensor, splits: Tensor) -> None:
        """Take in probabilities (N, C) whose rows belong to the splits with the numbers `splits` (N,) int64."""
        p = probabilities.detach().double()
        rows = torch.cat([torch.ones_like(p[:, :1]), torch.xlogy(p, p).sum(dim=1, keepdim=True), p], dim=1)
        if len(rows) == 0:
            return
        self.table = _with_rows(rows[:0] if self.table is None else self.table, int(splits.max()) + 1)
        self.table.index_add_(0, splits.to(rows.device), rows)

    def scores(self) -> Tensor:
        """The Inception Score of each split that has rows, (splits,) float64."""
        if self.table is None:
            raise ValueError("the Inception Score needs at least 1 picture, found 0")
        table = self.table[self.table[:, 0] > 0]
        mean = table[:, 1:] / table[:, :1]
        return (mean[:, 0] - torch.xlogy(mean[:, 1:], mean[:, 1:]).sum(dim=1)).exp()


def _with_rows(table: Tensor, count: int) -> Tensor:
    missing = max(count - len(table), 0)
    return torch.cat([table, table.new_zeros(missing, table.shape[1])])


def inception_score(probabilities: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """Mean over splits of exp(mean KL(p(y|x) || p(y))), from class probabilities (N, C).

    Splits are consecutive rows; the last one may be shorter and counts like the others. A probability of zero
    adds nothing to the sum, so the score stays finite.
    """
    if probabilities.ndim != 2 or len(probabilities) == 0:
        raise ValueError(f"probabilities must be (N, C) with N >= 1, found {tuple(probabilities.shape)}")
    statistics = ScoreStatistics()
    statistics.update(probabilities, torch.arange(len(probabilities)) // split_size)
    return statistics.scores().mean().item()


def precision_recall(
    real: Tensor, fake: Tensor, k: int = NEIGHBOURS, block_size: int = 10_000, half: bool = False
) -> tuple[float, float]:
    """Improved precision and recall of fake features (M, D) against real ones (N, D).

    Precision is the share of fake points inside the manifold of the real ones, recall the share of real
    points inside the manifold of the fake ones. A manifold is the union of balls around its points that reach
    to their k-th nearest neighbour in the same set. `half` measures distances in float16, as the established
    evaluator does.

    Raises:
        ValueError: when a set has no k-th neighbour or the widths differ.
    """
    _check_same_width(real, fake)
    if not half:  # distances do not change when both sets move, and small numbers keep more digits
        centre = real.double().mean(dim=0)
        real, fake = ((features.double() - centre).float() for features in (real, fake))
    real_radii = manifold_radii(real, k, block_size, half)
    fake_radii = manifold_radii(fake, k, block_size, half)
    precision = _share_inside(fake, real, real_radii, block_size, half)
    recall = _share_inside(real, fake, fake_radii, block_size, half)
    return precision, recall


def manifold_radii(features: Tensor, k: int = NEIGHBOURS, block_size: int = 10_000, half: bool = False) -> Tensor:
    """Squared distance (N,), float32, from each row of (N, D) to its k-th nearest other row."""
    if len(features) <= k:
        raise ValueError(f"neighbour {k} needs at least {k + 1} feature rows, found {len(features)}")
    return torch.cat([_nearest(rows, features, k + 1, block_size, half) for rows in features.split(block_size)])


def _nearest(rows: Tensor, features: Tensor, n: int, block_size: int, half: bool) -> Tensor:
    """The n-th smallest distance (itself included) of each row to all features, block by block."""
    smallest = rows.new_empty((len(rows), 0), dtype=torch.float32)
    for columns in features.split(block_size):
        candidates = torch.cat([smallest, squared_distances(rows, columns, half)], dim=1)
        smallest = candidates.topk(min(n, candidates.shape[1]), dim=1, largest=False).values
    return smallest[:, -1]


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, block_size: int, half: bool) -> float:
    """Share of the points that lie in at least one ball (border included) around the centres."""
    inside = 0
    for rows in points.split(block_size):
        covered = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, limits in zip(centres.split(block_size), radii.split(block_size)):
            covered |= (squared_distances(rows, columns, half) <= limits).any(dim=1)
        inside += int(covered.sum())
    return inside / len(points)


def squared_distances(a: Tensor, b: Tensor, half: bool = False) -> Tensor:
    """Squared Euclidean distances (N, M), float32, between the rows of (N, D) and (M, D).

    With `half` they are computed in float16, and again in float32 if any of them is not finite.
    """
    if half:
        distances = _squared_distances(a.half(), b.half())
        if distances.isfinite().all():
            return distances.float()
    return _squared_distances(a.float(), b.float())


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    norms_a = a.square().sum(dim=1, keepdim=True)
    norms_b = b.square().sum(dim=1)
    return (norms_a - 2 * (a @ b.T) + norms_b).clamp(min=0)


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 50, subset_size: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    Zero on average when both sets come from the same distribution, however few rows there are.

    Returns:
        mean and standard deviation over random subsets of both feature sets (each drawn without replacement).
    """
    _check_same_width(real, fake)
    size = min(subset_size, len(real), len(fake))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 feature rows in each set, found {size}")
    generator = torch.Generator().manual_seed(seed)
    real, fake = real.double(), fake.double()
    values = []
    for _ in range(subsets):
        pick = [torch.randperm(len(s), generator=generator)[:size].to(s.device) for s in (real, fake)]
        values.append(_unbiased_mmd(real[pick[0]], fake[pick[1]]))
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def _unbiased_mmd(x: Tensor, y: Tensor) -> Tensor:
    n, width = x.shape
    within_x, within_y, between = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = within_x.sum() - within_x.trace() + within_y.sum() - within_y.trace()
    return within / (n * (n - 1)) - 2 * between.mean()


def _check_features(features: Tensor) -> None:
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, D), found {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features must be finite, found NaN or infinity")


def _check_same_width(features1: Tensor, features2: Tensor) -> None:
    _check_features(features1)
    _check_features(features2)
    if features1.shape[1] != features2.shape[1]:
        raise ValueError(
            f"both feature sets must have the same width, found {features1.shape[1]} and {features2.shape[1]}"
        )
