"""PSNR and SSIM against the golden, a SciPy version of the definition, and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from evaluations.image_quality import psnr, ssim, ssim_established
from tests import golden
from utils.image import to_uint8


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@golden.cases("eval.psnr_ssim")
def test_established_psnr_and_ssim(case):
    reference = (case.tensors["x"] + 1) / 2
    restored = to_uint8(case.tensors["samples"]).permute(0, 3, 1, 2).float() / 255
    noise_ratio, similarity = psnr(restored, reference), ssim_established(restored, reference)
    case.check(
        {
            "psnr": noise_ratio.tolist(),
            "ssim": similarity.tolist(),
            "psnr_mean": noise_ratio.mean(),
            "ssim_mean": similarity.mean(),
        }
    )


def ssim_by_scipy(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """One channel, by the definition: a 7x7 mean filter, sample covariance, the border cropped."""
    mean = lambda z: uniform_filter(z, 7)  # noqa: E731
    correction = 49 / 48
    vx, vy = (correction * (mean(z * z) - mean(z) ** 2) for z in (x, y))
    vxy = correction * (mean(x * y) - mean(x) * mean(y))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * mean(x) * mean(y) + c1) * (2 * vxy + c2)
    quality = numerator / ((mean(x) ** 2 + mean(y) ** 2 + c1) * (vx + vy + c2))
    return quality[3:-3, 3:-3].mean()


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_agrees_with_scipy(data_range):
    x, y = noise(2, 3, 20, 26, seed=0).double(), noise(2, 3, 20, 26, seed=1).double()
    y = 0.6 * x + 0.4 * y
    want = [np.mean([ssim_by_scipy(a.numpy(), b.numpy(), data_range) for a, b in zip(*pair)]) for pair in zip(x, y)]
    assert ssim(x, y, data_range).tolist() == pytest.approx(want, rel=1e-10)


def test_the_established_range_flatters():
    x = noise(4, 3, 32, 32, seed=2)
    y = (x + 0.2 * noise(4, 3, 32, 32, seed=3)).clamp(0, 1)
    assert (ssim_established(x, y) > ssim(x, y) + 1e-4).all()
    assert torch.equal(ssim_established(x, y), ssim(x, y, data_range=2.0))


def test_a_batch_is_its_singles():
    x, y = noise(5, 3, 16, 16, seed=4), noise(5, 3, 16, 16, seed=5)
    for measure in (psnr, ssim, ssim_established):
        singles = torch.cat([measure(a[None], b[None]) for a, b in zip(x, y)])
        torch.testing.assert_close(measure(x, y), singles, rtol=1e-12, atol=0)


def test_psnr_by_hand():
    reference = torch.zeros(2, 3, 4, 4)
    images = reference + torch.tensor([0.1, 0.5]).view(2, 1, 1, 1)
    assert psnr(images, reference).tolist() == pytest.approx([20, 20 * math.log10(2)], rel=1e-6)
    assert psnr(images * 255, reference, data_range=255).tolist() == pytest.approx([20, 6.0206], rel=1e-5)


def test_equal_images():
    x = noise(2, 3, 9, 9, seed=6)
    assert psnr(x, x).tolist() == [math.inf, math.inf]
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_constant_images_have_a_closed_form():
    x, y = torch.full((1, 1, 8, 8), 0.2), torch.full((1, 1, 8, 8), 0.6)
    want = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(x, y).item() == pytest.approx(want, rel=1e-6)


def test_inputs_are_checked():
    x = noise(1, 3, 8, 8, seed=7)
    with pytest.raises(ValueError, match="one shape"):
        psnr(x, x[:, :1])
    with pytest.raises(ValueError, match="one shape"):
        ssim(x[0], x[0])
    with pytest.raises(ValueError, match="floating point"):
        psnr((x * 255).byte(), (x * 255).byte())
    with pytest.raises(ValueError, match="at least 7x7"):
        ssim(x[..., :6], x[..., :6])
