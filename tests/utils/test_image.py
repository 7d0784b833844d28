"""Pixels, resizing, grids and PNG files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from tests import golden
from utils.image import make_grid_image, resize_bicubic, save_png, to_float, to_uint8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@golden.cases("img.to_uint8")
def test_established_pixels(case):
    case.check({"u8": to_uint8(case.tensors["x"])})


def test_pixels_truncate():
    x = torch.tensor([-2.0, -1.0, -0.9999, 0.0, 0.0039, 0.996, 1.0, 3.0]).view(1, 1, 1, -1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 128, 254, 255, 255]


def test_every_level_survives_the_round_trip():
    pictures = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    images = to_float(pictures)
    assert images.shape == (2, 3, 16, 16)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(to_uint8(images), pictures)


def test_bfloat16_is_widened_before_scaling():
    x = noise(1, 3, 8, 8).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


@golden.cases("eval.resize")
def test_established_resize(case):
    case.check({"bicubic": resize_bicubic(case.tensors["x"], case.params["size"])})


def test_antialiasing_flattens_a_checkerboard():
    board = torch.ones(1, 1, 24, 24)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    assert resize_bicubic(board, 8).abs().mean() > 0.5
    assert resize_bicubic(board, 8, antialias=True).abs().mean() < 0.1


@pytest.mark.parametrize(("count", "columns", "padding"), [(8, 4, 2), (5, 4, 2), (3, 8, 1), (1, 4, 2), (4, 1, 0)])
def test_grid_is_the_one_torchvision_writes(tmp_path, count, columns, padding):
    images = noise(count, 3, 12, 10)
    save_image(images, tmp_path / "want.png", nrow=columns, padding=padding, normalize=True, value_range=(-1, 1))
    want = np.asarray(Image.open(tmp_path / "want.png"))
    assert np.array_equal(np.asarray(make_grid_image(images, columns, padding)), want)


def test_grid_layout():
    images = torch.full((8, 3, 256, 256), -1.0)
    images[5] = 1.0
    grid = make_grid_image(images, columns=4)
    assert grid.size == (1034, 518)
    white = np.argwhere(np.asarray(grid)[..., 0] == 255)
    assert (white.min(0).tolist(), white.max(0).tolist()) == (
        [260, 260],
        [515, 515],
    )  # second row, second column


def test_grid_does_not_change_its_input():
    images = noise(4, 3, 8, 8)
    before = images.clone()
    make_grid_image(images, 2)
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, Image.fromarray], ids=["tensor", "array", "pil"])
def test_png_round_trip(tmp_path, kind):
    picture = to_uint8(noise(1, 3, 9, 7))[0].numpy()
    save_png(kind(picture), tmp_path / "new" / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), picture)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_metadata_is_readable(tmp_path):
    picture = to_uint8(noise(1, 3, 4, 4))[0]
    save_png(picture, tmp_path / "a.png", {"prompt": "a cat", "caption": "猫", "seed": 7, "labels": [207, 360]})
    text = Image.open(tmp_path / "a.png").text
    assert dict(text) == {"prompt": "a cat", "caption": "猫", "seed": "7", "labels": "[207, 360]"}
    assert b"tEXtprompt\0a cat" in (tmp_path / "a.png").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    picture = to_uint8(noise(1, 3, 4, 4))[0]
    save_png(picture, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, file, **_):
        file.write(b"half a fi")
        raise RuntimeError("lost power")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(RuntimeError, match="lost power"):
        save_png(picture, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_pictures_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, found \(3, 4, 4\) float32"):
        save_png(noise(3, 4, 4), tmp_path / "a.png")
