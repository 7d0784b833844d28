"""PSNR and SSIM of batches of images, with the definitions of scikit-image.

SSIM (Wang et al., 2004) uses the uniform 7x7 window, sample covariances, and the mean over channels and over
all windows that lie inside the image.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d

WINDOW = 7
_K1, _K2 = 0.01, 0.03


def psnr(images: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,) float64, of images (N, C, H, W) whose values span `data_range`.

    Infinite where image and reference are equal.
    """
    _check_pair(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return 10 * (data_range**2 / error).log10()


def ssim(images: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity, (N,) float64, of images (N, C, H, W) whose values span `data_range`.

    Raises:
        ValueError: for images smaller than the window.
    """
    _check_pair(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW}x{WINDOW} pixels, found {tuple(images.shape)}")
    x, y = images.double(), reference.double()
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    var_x = unbiased * (_window_mean(x * x) - mean_x**2)
    var_y = unbiased * (_window_mean(y * y) - mean_y**2)
    covariance = unbiased * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def ssim_established(images: Tensor, reference: Tensor) -> Tensor:
    """SSIM of images in [0, 1] as LlamaGen's published tables measure it: with a data range of 2.

    The doubled range raises the score a little (0.675 for the stride-16 tokenizer is this number). Report it
    only beside published values; `ssim` is the correct one.
    """
    return ssim(images, reference, data_range=2.0)


def _window_mean(x: Tensor) -> Tensor:
    return avg_pool2d(x, WINDOW, stride=1)


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.ndim != 4 or images.shape != reference.shape:
        raise ValueError(
            f"images and reference must have one shape (N, C, H, W), "
            f"found {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    if not (images.is_floating_point() and reference.is_floating_point()):
        raise ValueError(f"images must be floating point, found {images.dtype} and {reference.dtype}")
