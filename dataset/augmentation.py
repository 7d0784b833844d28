"""Crops and the transforms made of them: training, evaluation and code extraction.

All transforms take a PIL image in RGB and give float32 in [-1, 1], channels first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import ModuleType

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

Transform = Callable[[Image.Image], Tensor]


def _resize_shorter_side(pil_image: Image.Image, target: int) -> Image.Image:
    """Scale so that the shorter side is `target`: halvings by box filter, then one bicubic step (ADM)."""
    while min(pil_image.size) >= 2 * target:
        pil_image = pil_image.resize((pil_image.width // 2, pil_image.height // 2), Image.Resampling.BOX)
    scale = target / min(pil_image.size)
    size = (round(pil_image.width * scale), round(pil_image.height * scale))
    return pil_image.resize(size, Image.Resampling.BICUBIC)


def _window(pil_image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return pil_image.crop((left, top, left + size, top + size))


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """The central square after scaling the shorter side to `image_size` (the preprocessing of ADM).

    Small images are enlarged; the image mode is kept. Gives image_size x image_size.
    """
    scaled = _resize_shorter_side(pil_image, image_size)
    return _window(scaled, (scaled.width - image_size) // 2, (scaled.height - image_size) // 2, image_size)


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    rng: random.Random | ModuleType = random,
) -> Image.Image:
    """A random square of `image_size` showing `min_crop_frac` to `max_crop_frac` of the shorter side.

    Draws three numbers from `rng` (Python's random module unless given): shorter side, top, left.
    """
    smallest, largest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    scaled = _resize_shorter_side(pil_image, rng.randrange(smallest, largest + 1))
    top = rng.randrange(scaled.height - image_size + 1)
    left = rng.randrange(scaled.width - image_size + 1)
    return _window(scaled, left, top, image_size)


def ten_crop_size(image_size: int, crop_range: float) -> int:
    """Side of the central square that the ten crops are taken from.

    Raises:
        ValueError: when `crop_range` is below 1, so that the crops would not fit.
    """
    if crop_range < 1:
        raise ValueError(f"the crop range must be at least 1, found {crop_range}")
    return int(image_size * crop_range)


def ten_crop_arr(pil_image: Image.Image, image_size: int, crop_range: float = 1.1) -> list[Image.Image]:
    """Ten crops of the central square of side int(image_size * crop_range).

    Order: top left, top right, bottom left, bottom right, centre, then the same five of the mirrored square.
    """
    square = center_crop_arr(pil_image, ten_crop_size(image_size, crop_range))
    return list(functional.ten_crop(square, image_size))


def mirrored_pair(pil_image: Image.Image, image_size: int) -> list[Image.Image]:
    """The centre crop and its horizontal mirror image."""
    crop = center_crop_arr(pil_image, image_size)
    return [crop, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]


def normalized(pil_image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1]."""
    return functional.to_tensor(pil_image).mul_(2).sub_(1)


class TorchRandomCrop:
    """`random_crop_arr` seeded by torch: `torch.manual_seed` fixes it, with or without workers."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, pil_image: Image.Image) -> Image.Image:
        rng = random.Random(int(torch.randint(2**62, ())))
        return random_crop_arr(pil_image, self.image_size, rng=rng)


class ExtractionTransform:
    """An RGB image as all the views of it that are turned into codes, (A, 3, S, S)."""

    def __init__(self, image_size: int, ten_crop: bool, crop_range: float) -> None:
        ten_crop_size(image_size, crop_range)
        self.image_size, self.ten_crop, self.crop_range = image_size, ten_crop, crop_range

    def __call__(self, pil_image: Image.Image) -> Tensor:
        if self.ten_crop:
            views = ten_crop_arr(pil_image, self.image_size, self.crop_range)
        else:
            views = mirrored_pair(pil_image, self.image_size)
        return torch.stack([normalized(view) for view in views])


class EvalTransform:
    """Centre crop and normalisation, (3, S, S)."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, pil_image: Image.Image) -> Tensor:
        return normalized(center_crop_arr(pil_image, self.image_size))


def train_transform(image_size: int) -> Transform:
    """Random crop and horizontal flip, (3, S, S) in [-1, 1]. Every draw comes from torch's generator."""
    return transforms.Compose([TorchRandomCrop(image_size), transforms.RandomHorizontalFlip(), normalized])


def eval_transform(image_size: int) -> Transform:
    """Centre crop, (3, S, S) in [-1, 1]."""
    return EvalTransform(image_size)


def extraction_transform(image_size: int, ten_crop: bool = False, crop_range: float = 1.1) -> Transform:
    """Views for code extraction, (A, 3, S, S) in [-1, 1].

    A is 10 with `ten_crop` (see `ten_crop_arr`), else 2: the centre crop and its mirror image, where
    `crop_range` has no effect.
    """
    return ExtractionTransform(image_size, ten_crop, crop_range)
