"""Masks of latent cells from boxes, pictures, lists, and by chance."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.sample import masks


def as_text(mask):
    edge = int(len(mask) ** 0.5)
    return ["".join(".#"[int(cell)] for cell in row) for row in mask.view(edge, edge)]


def test_a_box_takes_every_cell_that_it_touches():
    assert as_text(masks.of_boxes([(4, 0, 8, 5)], 4, 4)) == [".#..", ".#..", "....", "...."]
    assert as_text(masks.of_boxes([(3, 8, 5, 12), (15, 15, 16, 16)], 4, 4)) == ["....", "....", "##..", "...#"]
    assert masks.of_boxes([(0, 0, 16, 16)], 4, 4).all() and not masks.of_boxes([], 4, 4).any()
    for box in [(4, 0, 4, 8), (0, 0, 17, 4), (-1, 0, 4, 4)]:
        with pytest.raises(ValueError, match="LEFT TOP RIGHT BOTTOM"):
            masks.of_boxes([box], 4, 4)


def test_cells_by_number():
    assert as_text(masks.of_cells([0, 5], 3)) == ["#..", "..#", "..."]
    with pytest.raises(ValueError, match=r"0 to 8 .*not 9"):
        masks.of_cells([9], 3)


def test_a_picture_is_cropped_like_an_image_and_one_bright_pixel_is_enough(tmp_path):
    picture = np.zeros((16, 24), dtype=np.uint8)
    picture[5, 9], picture[0, 0] = 255, 255  # the second one is cut off: the crop takes columns 4 to 19
    Image.fromarray(picture).save(tmp_path / "mask.png")
    assert as_text(masks.of_picture(tmp_path / "mask.png", 4, 4)) == ["....", ".#..", "....", "...."]


def test_a_random_share():
    mask = masks.at_random(0.25, 4, seed=1)
    assert mask.sum() == 4 and torch.equal(mask, masks.at_random(0.25, 4, seed=1))
    assert not torch.equal(mask, masks.at_random(0.25, 4, seed=2))
    with pytest.raises(ValueError, match="0 to 1"):
        masks.at_random(1.5, 4, seed=1)


def test_shifts_move_whole_cells_and_free_the_other_side():
    codes = torch.arange(9)[None]
    moved, free = masks.shift(codes, 1, 0)
    assert moved[0, 3:].tolist() == list(range(6)) and as_text(free) == ["###", "...", "..."]
    moved, free = masks.shift(codes, -1, 1)
    assert as_text(free) == ["#..", "#..", "###"] and moved.view(3, 3)[:2, 1:].tolist() == [[3, 4], [6, 7]]
    moved, free = masks.shift(codes, 0, 0)
    assert torch.equal(moved, codes) and not free.any()
    with pytest.raises(ValueError, match="less than 3 cells"):
        masks.shift(codes, 3, 0)


def test_a_mask_at_the_size_of_the_picture():
    pixels = masks.as_pixels(torch.tensor([True, False, False, False]), 3)
    assert pixels.shape == (6, 6) and pixels[:3, :3].all() and pixels.sum() == 9
