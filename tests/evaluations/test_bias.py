"""Estimates of a distance's bias and spread, on Gaussians whose distance is known."""

from __future__ import annotations

import pytest
import torch

from evaluations.bias import _intercept, bootstrap_interval, frechet_at_infinity
from evaluations.metrics import FeatureStatistics, Gaussian, frechet_distance_between

WIDTH = 32


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def reference() -> Gaussian:
    return Gaussian.of(torch.zeros(WIDTH), torch.eye(WIDTH))


def distance(features: torch.Tensor) -> float:
    statistics = FeatureStatistics()
    statistics.update(features)
    return frechet_distance_between(reference(), statistics.gaussian())


def test_the_line_through_points_on_a_line_meets_zero_exactly():
    x = 1 / torch.linspace(500, 5000, 15, dtype=torch.float64)
    found = _intercept(x, 3.25 + 800 * x)
    assert found.distance == pytest.approx(3.25, rel=1e-12)
    assert found.error < 1e-9


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_extrapolation_removes_the_bias(shift):
    samples = draw(2000, seed=1) + shift
    true = WIDTH * shift**2
    measured = distance(samples)
    found = frechet_at_infinity(reference(), samples, least=200)
    assert measured - true > 0.1  # too few samples for this width
    assert abs(found.distance - true) < 0.4 * (measured - true) + 0.1 * shift
    assert found.error < 0.1
    assert frechet_at_infinity(reference(), samples, least=200) == found
    assert frechet_at_infinity(reference(), samples, least=200, seed=1) != found


def test_a_line_needs_samples():
    with pytest.raises(ValueError, match="at least 10000 samples and 3 points on the line, found 2000 and 15"):
        frechet_at_infinity(reference(), draw(2000, seed=1))


def test_the_interval_shows_the_spread_of_other_draws():
    found = bootstrap_interval(reference(), draw(500, seed=2) + 0.5, repeats=40)
    others = torch.tensor([distance(draw(500, seed=100 + i) + 0.5) for i in range(40)])
    assert found.deviation == pytest.approx(others.std().item(), rel=0.4)
    middle = distance(draw(500, seed=2) + 0.5)
    assert (found.low + found.high) / 2 == pytest.approx(middle)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * found.deviation)
    with pytest.raises(ValueError, match="at least 2 repeats"):
        bootstrap_interval(reference(), draw(50, seed=2), repeats=1)
