"""Crops and transforms."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import augmentation as aug
from tests import golden
from tokenizer.tokenizer_image.vq_model import ModelArgs, VQModel
from utils import data as utils_data


def picture(array: torch.Tensor) -> Image.Image:
    return Image.fromarray(array.numpy())


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@golden.cases("aug.center_crop")
def test_center_crop(case: golden.Case) -> None:
    image = picture(case.tensors["image"])
    crops = {f"size{size}": aug.center_crop_arr(image, size) for size in case.params["sizes"]}
    case.check({name: pixels(crop) for name, crop in crops.items()})


def test_twice_the_size_is_halved_by_the_box_filter() -> None:
    image = noise(32, 40)
    halved = image.resize((20, 16), Image.Resampling.BOX).crop((2, 0, 18, 16))
    assert np.array_equal(pixels(aug.center_crop_arr(image, 16)), pixels(halved))


def test_ten_crops_are_cut_from_a_tenth_more_unless_told_otherwise() -> None:
    image = noise(40, 30)
    for default, told in zip(aug.ten_crop_arr(image, 16), aug.ten_crop_arr(image, 16, 1.1), strict=True):
        assert np.array_equal(pixels(default), pixels(told))


@golden.cases("aug.random_crop")
def test_random_crop(case: golden.Case) -> None:
    outputs = {}
    for number, call in enumerate(case.params["calls"]):
        options = dict(call)
        random.seed(options.pop("seed"))
        outputs[f"call{number}"] = pixels(aug.random_crop_arr(picture(case.tensors["image"]), **options))
    case.check(outputs)


@golden.cases("aug.ten_crop")
def test_ten_crop(case: golden.Case) -> None:
    image, size, crop_range = (
        picture(case.tensors["image"]),
        case.params["image_size"],
        case.params["crop_range"],
    )
    crops = aug.ten_crop_arr(image, size, crop_range)
    views = aug.extraction_transform(size, ten_crop=True, crop_range=crop_range)(image)
    assert views.shape == (10, 3, size, size) and views.dtype == torch.float32
    case.check(
        {
            "crops_uint8": torch.stack([pixels(crop).permute(2, 0, 1) for crop in crops]),
            "crops_float_first": views[0],
            "single_float": aug.eval_transform(size)(image),
            "crop_size": aug.ten_crop_size(size, crop_range),
        }
    )


@golden.cases("aug.extract_codes")
def test_extract_codes(case: golden.Case) -> None:
    config = case.config
    model = VQModel(
        ModelArgs(
            codebook_size=config["codebook_size"],
            codebook_embed_dim=config["codebook_embed_dim"],
            encoder_ch_mult=config["ch_mult"],
            decoder_ch_mult=config["ch_mult"],
            ch=config["ch"],
            num_res_blocks=config["num_res_blocks"],
            z_channels=config["z_channels"],
        )
    )
    case.fill(model).eval()
    size = case.params["image_size"]
    transforms = {
        "ten": aug.extraction_transform(size, ten_crop=True, crop_range=case.params["crop_range"]),
        "flip": aug.extraction_transform(size),
        "t2i": lambda image: aug.eval_transform(size)(image)[None],
    }
    differing = total = 0
    for number in range(case.params["n_images"]):
        for name, transform in transforms.items():
            views = transform(picture(case.tensors[f"image{number}"]))
            with torch.no_grad():
                codes = model.encode(views)[2][2].reshape(len(views), -1)
            wanted = case.outputs[f"{name}_codes{number}"].reshape(codes.shape)
            differing, total = differing + int((codes != wanted).sum()), total + codes.numel()
    assert differing <= 0.005 * total  # near-ties of the nearest code may fall the other way


def test_utils_data_is_the_same_crop() -> None:
    assert utils_data.center_crop_arr is aug.center_crop_arr


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(7, 100), (300, 40), (33, 33)])
def test_center_crop_keeps_mode_and_gives_a_square(mode: str, size: tuple[int, int]) -> None:
    crop = aug.center_crop_arr(Image.new(mode, size), 32)
    assert crop.size == (32, 32) and crop.mode == mode


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64))
def test_crops_of_any_image_are_squares(height: int, width: int, size: int) -> None:
    image = noise(height, width)
    assert aug.center_crop_arr(image, size).size == (size, size)
    assert aug.random_crop_arr(image, size).size == (size, size)


def test_random_crop_draws_every_allowed_size() -> None:
    targets = []

    class Recorder(random.Random):
        def randrange(self, *bounds: int) -> int:
            if len(bounds) == 2:
                targets.append(bounds)
            return super().randrange(*bounds)

    aug.random_crop_arr(noise(300, 400), 256, rng=Recorder(0))
    assert targets == [(256, 321)]  # the shorter side: 256 to 320, both included


@pytest.mark.parametrize(
    ("crop_range", "sizes"),
    [(1.1, (281, 422, 492, 563)), (1.05, (268, 403, 470, 537)), (1.0, (256, 384, 448, 512))],
)
def test_ten_crop_sizes(crop_range: float, sizes: tuple[int, ...]) -> None:
    assert tuple(aug.ten_crop_size(size, crop_range) for size in (256, 384, 448, 512)) == sizes


def test_ten_crop_order() -> None:
    image = noise(40, 40)
    crops = [pixels(crop) for crop in aug.ten_crop_arr(image, 32, crop_range=1.25)]
    whole, mirror = pixels(image), pixels(image).flip(1)
    for source, part in ((whole, crops[:5]), (mirror, crops[5:])):
        for crop, (top, left) in zip(part, [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]):
            assert torch.equal(crop, source[top : top + 32, left : left + 32])
    assert torch.equal(crops[5], crops[1].flip(1))  # top left of the mirror is the mirrored top right


def test_crop_range_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        aug.extraction_transform(32, ten_crop=True, crop_range=0.9)


def test_extraction_without_ten_crop_is_the_crop_and_its_mirror() -> None:
    image = noise(50, 70)
    views = aug.extraction_transform(32)(image)
    assert views.shape == (2, 3, 32, 32)
    assert torch.equal(views[1], views[0].flip(-1))
    assert torch.equal(views[0], aug.eval_transform(32)(image))


def test_values_lie_between_minus_one_and_one() -> None:
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    assert torch.allclose(aug.normalized(image).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_training_crops_follow_torch_alone() -> None:
    """Without loader workers nothing seeds Python's random module; torch's seed has to be enough."""
    image, transform = noise(90, 120), aug.train_transform(32)

    def views(python_seed: int) -> torch.Tensor:
        random.seed(python_seed)
        torch.manual_seed(0)
        return torch.stack([transform(image) for _ in range(8)])

    first = views(1)
    assert torch.equal(first, views(2))
    assert len({view.sum().item() for view in first}) == 8
    assert first.min() >= -1 and first.max() <= 1 and first.shape == (8, 3, 32, 32)
