"""Metric arithmetic against the goldens, SciPy, and formulas that are known in closed form."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluations.metrics import (
    FeatureStatistics,
    class_probabilities,
    frechet_distance,
    frechet_distance_between,
    frechet_distance_of_features,
    inception_score,
    kernel_distance,
    manifold_radii,
    precision_recall,
    squared_distances,
)
from tests import golden


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(*batches: torch.Tensor) -> FeatureStatistics:
    result = FeatureStatistics()
    for batch in batches:
        result.update(batch)
    return result


def distance_of(first: FeatureStatistics, second: FeatureStatistics) -> float:
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def distance_by_scipy(first: FeatureStatistics, second: FeatureStatistics) -> float:
    root = scipy.linalg.sqrtm((first.covariance @ second.covariance).numpy()).real
    trace = first.covariance.trace() + second.covariance.trace() - 2 * root.trace()
    return float((first.mean - second.mean).square().sum() + trace)


# --- statistics and Frechet distance


@golden.cases("eval.fid")
def test_established_frechet_distance(case):
    ref, sample = statistics(case.tensors["ref"]), statistics(case.tensors["sample"])
    outputs = {"mu_ref": ref.mean, "sigma_ref": ref.covariance, "sigma_dtype": str(ref.covariance.dtype)[6:]}
    # the established evaluator keeps its mean in float32; here it is float64 like everything else
    skip = ("mu_dtype",)
    case.check({**outputs, "fid": distance_of(ref, sample)}, skip)
    case.check({**outputs, "fid": frechet_distance_of_features(case.tensors["ref"], case.tensors["sample"])}, skip)
    assert ref.mean.dtype == torch.float64


def test_frechet_distance_agrees_with_scipy():
    first = statistics(normal(400, 20, seed=1))
    second = statistics(normal(300, 20, seed=2) @ normal(20, 20, seed=3) + 0.5)
    assert distance_of(first, second) == pytest.approx(distance_by_scipy(first, second), rel=1e-10)


def test_frechet_distance_of_commuting_gaussians_in_closed_form():
    variances1, variances2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([16.0, 4.0, 0.0])
    mean1, mean2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])
    got = frechet_distance(mean1, torch.diag(variances1), mean2, torch.diag(variances2))
    assert got == pytest.approx(2**2 + (1 - 4) ** 2 + 0 + 3**2, rel=1e-12)


def test_frechet_distance_is_symmetric_and_zero_at_home():
    first, second = statistics(normal(60, 8, seed=4)), statistics(normal(50, 8, seed=5) * 2)
    assert distance_of(first, second) == pytest.approx(distance_of(second, first), rel=1e-12)
    assert abs(distance_of(first, first)) < 1e-12


def test_rank_deficient_distance_is_exact():
    """Two rank-one sets: the trace term is the product of the lengths times the cosine between them."""
    a, b = torch.zeros(2, 40), torch.zeros(2, 40)
    a[:, 0] = torch.tensor([-3.0, 3.0])  # variance 18 along the first axis
    b[:, :2] = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])  # variance 4 along the diagonal
    want = 18 + 4 - 2 * math.sqrt(18 * 4) * math.sqrt(0.5)
    assert frechet_distance_of_features(a, b) == pytest.approx(want, rel=1e-12)
    assert distance_of(statistics(a), statistics(b)) == pytest.approx(want, rel=1e-7)  # half of the digits
    got = frechet_distance_between(statistics(a[:1], a[1:]).gaussian(), statistics(b).gaussian())
    assert got == pytest.approx(want, rel=1e-12)


def test_rows_are_kept_while_they_are_few():
    features = normal(9, 8, seed=20)
    assert torch.equal(statistics(*features[:8].split(3)).rows, features[:8])
    merged = statistics(features[:4])
    merged.merge(statistics(features[4:8]))
    assert torch.equal(merged.rows, features[:8])
    merged.merge(statistics(features[8:]))
    assert merged.rows is None
    torch.testing.assert_close(merged.gaussian(), statistics(features).gaussian())


def test_both_forms_agree_when_samples_are_few():
    a, b = normal(30, 200, seed=6), normal(500, 200, seed=7) * 1.5 + 0.1
    exact = frechet_distance_of_features(a, b)
    assert distance_of(statistics(a), statistics(b)) == pytest.approx(exact, rel=1e-7)


def test_small_eigenvalues_count():
    """A relative eigenvalue threshold of 1e-12 would lose the second term of the trace."""
    tiny = 1e-13
    first, second = (
        torch.diag(torch.tensor([1.0, tiny]).double()),
        torch.diag(torch.tensor([1.0, 1.0]).double()),
    )
    zero = torch.zeros(2)
    want = 1 + tiny - 2 * math.sqrt(tiny)
    assert frechet_distance(zero, first, zero, second) == pytest.approx(want, abs=1e-12)


def test_statistics_agree_with_torch_cov():
    features = normal(97, 6, seed=8)
    got = statistics(*features.split(10))
    torch.testing.assert_close(got.mean, features.double().mean(0))
    torch.testing.assert_close(got.covariance, features.double().T.cov())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1))
def test_statistics_do_not_depend_on_batches_or_ranks(sizes):
    features = normal(sum(sizes), 4, seed=9) + 100
    whole, batches = statistics(features), features.split(sizes)
    ranks = FeatureStatistics()
    for batch in batches:
        ranks.merge(statistics(batch))
    ranks.merge(FeatureStatistics())
    for got in (statistics(*batches), ranks):
        assert got.count == whole.count
        torch.testing.assert_close(got.mean, whole.mean)
        torch.testing.assert_close(got.covariance, whole.covariance)


def test_a_large_offset_costs_no_digits():
    features = normal(1000, 3, seed=10).double()
    shifted = statistics(*(features + 1e6).split(64))
    torch.testing.assert_close(shifted.covariance, features.T.cov(), rtol=1e-6, atol=1e-6)


def test_half_precision_features_are_accumulated_in_double():
    features = normal(64, 3, seed=11).half()
    torch.testing.assert_close(statistics(features).covariance, features.double().T.cov())


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows(count):
    with pytest.raises(ValueError, match=f"at least 2 feature rows, found {count}"):
        _ = statistics(normal(count, 3, seed=0)).covariance
    with pytest.raises(ValueError, match="at least 2 feature rows"):
        frechet_distance_of_features(normal(count, 3, seed=0), normal(9, 3, seed=1))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="same width, found 3 and 4"):
        frechet_distance_of_features(normal(5, 3, seed=0), normal(5, 4, seed=0))
    with pytest.raises(ValueError, match=r"shape \(N, D\)"):
        FeatureStatistics().update(normal(5, 3, 1, seed=0))
    with pytest.raises(ValueError, match="with one D"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_must_be_finite(bad):
    features = normal(9, 3, seed=0)
    features[4, 1] = bad
    with pytest.raises(ValueError, match="features must be finite"):
        precision_recall(normal(9, 3, seed=1), features)
    with pytest.raises(ValueError, match="means and covariances must be finite"):
        frechet_distance(torch.zeros(1), torch.eye(1), torch.zeros(1), torch.full((1, 1), bad))


# --- Inception Score


@golden.cases("eval.inception_score")
def test_established_inception_score(case):
    probabilities = class_probabilities(case.tensors["acts"], case.tensors["softmax_w"])
    scores = {f"split_{size}": inception_score(probabilities, size) for size in case.params["splits"]}
    case.check({**scores, "default_split": inception_score(probabilities)})


def test_inception_score_bounds():
    assert inception_score(torch.full((12, 5), 0.2)) == pytest.approx(1)  # all images look the same
    assert inception_score(torch.eye(5).repeat(3, 1)) == pytest.approx(5)  # sure and balanced: the class count


def test_inception_score_stays_finite_when_a_probability_underflows():
    logits = torch.tensor([[0.0, -200.0], [0.0, -200.0]])
    probabilities = logits.softmax(1)
    assert probabilities[0, 1] == 0
    assert inception_score(probabilities) == 1


def test_splits_are_consecutive_and_a_short_one_counts_fully():
    one_class, two_classes = torch.eye(2)[[0, 0, 0, 0]], torch.eye(2)[[0, 1]]
    probabilities = torch.cat([one_class, two_classes])
    assert inception_score(probabilities, split_size=4) == pytest.approx((1 + 2) / 2)
    assert inception_score(probabilities.flip(0), split_size=4) == pytest.approx((math.exp(entropy(0.25)) + 1) / 2)


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_inception_score_needs_rows():
    with pytest.raises(ValueError, match="N >= 1"):
        inception_score(torch.zeros(0, 5))


# --- precision and recall


@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
@golden.cases("eval.prec_recall")
def test_established_precision_and_recall(case, half):
    ref, sample = case.tensors["ref"], case.tensors["sample"]
    for block_size in (10_000, *case.params.values()):
        precision, recall = precision_recall(ref, sample, block_size=block_size, half=half)
        case.check(
            {
                "radii_ref": manifold_radii(ref, block_size=block_size, half=half)[:, None],
                "radii_sample": manifold_radii(sample, block_size=block_size, half=half)[:, None],
                "pairwise_block": squared_distances(ref[:8], sample[:8], half),
                "precision": precision,
                "recall": recall,
            }
        )


def brute_force(real: torch.Tensor, fake: torch.Tensor, k: int) -> tuple[float, float]:
    def covered(points, centres):
        between = torch.cdist(points.double(), centres.double())
        radii = torch.cdist(centres.double(), centres.double()).sort(dim=1).values[:, k]
        return (between <= radii).any(dim=1).double().mean().item()

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_precision_recall_agrees_with_brute_force(k, block_size):
    real, fake = normal(60, 5, seed=12), normal(50, 5, seed=13) * 0.7 + 0.8
    assert precision_recall(real, fake, k, block_size) == pytest.approx(brute_force(real, fake, k), abs=1e-12)


def test_a_common_offset_changes_nothing():
    real, fake = normal(60, 5, seed=14), normal(60, 5, seed=15) * 0.8
    plain = precision_recall(real, fake)
    assert 0 < plain[1] < 1
    assert precision_recall(real.double() + 3e5, fake.double() + 3e5) == plain


def test_precision_is_not_recall():
    real, fake = normal(200, 2, seed=16), normal(200, 2, seed=17) * 0.05
    precision, recall = precision_recall(real, fake)
    assert precision > 0.95  # a collapsed model draws plausible images ...
    assert recall < 0.2  # ... and misses most of the real ones


def test_float16_distances_fall_back_to_float32_when_they_overflow():
    a, b = torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert a.half().square().isinf().any()
    assert squared_distances(a, b, half=True).item() == 300**2 + 1
    rounded = squared_distances(a / 10 + 0.013, b, half=True).item()
    assert rounded != squared_distances(a / 10 + 0.013, b).item()


def test_no_third_neighbour():
    with pytest.raises(ValueError, match="at least 4 feature rows, found 3"):
        precision_recall(normal(3, 2, seed=0), normal(9, 2, seed=0))


# --- kernel distance


def test_kernel_distance_by_hand():
    """D = 1, x = {0, 1}, y = {0, 2}: (1 + 1)/2 + (1 + 1)/2 - 2 (1 + 1 + 1 + 27)/4."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    mean, deviation = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(1 + 1 - 15)
    assert deviation == pytest.approx(0)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    real, same = normal(400, 8, seed=18), normal(400, 8, seed=19)
    mean, deviation = kernel_distance(real, same)
    assert abs(mean) < deviation
    assert kernel_distance(real, same + 0.5)[0] > 10 * deviation
    assert kernel_distance(real, same) == (mean, deviation)
    assert kernel_distance(real, same, seed=1) != (mean, deviation)
