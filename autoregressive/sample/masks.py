"""Which latent cells of an image to draw anew: from boxes, pictures, lists, or at random.

A mask is bool (N,), True = draw anew, over the cells of a square grid in raster order: row by row, left to right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.augmentation import center_crop_arr
from dataset.images import read_rgb


def of_boxes(boxes: Sequence[Sequence[int]], grid: int, stride: int) -> Tensor:
    """The cells that boxes (left, top, right, bottom) in pixels touch; right and bottom are excluded.

    Raises:
        ValueError: for a box that is empty or reaches outside the picture.
    """
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    edge = grid * stride
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= edge and 0 <= top < bottom <= edge):
            raise ValueError(
                f"a box is LEFT TOP RIGHT BOTTOM in pixels with 0 <= LEFT < RIGHT <= {edge} and the same from top to "
                f"bottom, not {left} {top} {right} {bottom}"
            )
        mask[top // stride : -(-bottom // stride), left // stride : -(-right // stride)] = True
    return mask.flatten()


def of_cells(cells: Sequence[int], grid: int) -> Tensor:
    """The cells with these numbers, 0 to N - 1.

    Raises:
        ValueError: for a number outside.
    """
    wrong = [cell for cell in cells if not 0 <= cell < grid**2]
    if wrong:
        raise ValueError(f"cells are 0 to {grid**2 - 1} (row * {grid} + column), not {wrong[0]}")
    mask = torch.zeros(grid**2, dtype=torch.bool)
    mask[list(cells)] = True
    return mask


def of_picture(path: str | Path, grid: int, stride: int) -> Tensor:
    """The cells in which a picture is bright (above 127) anywhere, after the centre crop that images get."""
    picture = center_crop_arr(read_rgb(path), grid * stride)
    return _cells(torch.from_numpy(np.array(picture.convert("L"))) > 127, stride)


def of_alpha(alpha: Image.Image, grid: int, stride: int) -> Tensor:
    """The cells in which an alpha channel (mode L) is transparent (below 128) anywhere, after the same crop."""
    return _cells(torch.from_numpy(np.array(center_crop_arr(alpha, grid * stride))) < 128, stride)


def _cells(pixels: Tensor, stride: int) -> Tensor:
    """The cells with any of `pixels`, bool (H, W)."""
    return F.max_pool2d(pixels.float()[None], stride).bool().flatten()


def at_random(share: float, grid: int, seed: int) -> Tensor:
    """This share of the cells, rounded, chosen by `seed`. ValueError for a share outside 0 to 1."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the cells is 0 to 1, not {share}")
    order = torch.randperm(grid**2, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(grid**2, dtype=torch.bool)
    mask[order[: round(share * grid**2)]] = True
    return mask


def shift(codes: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Move codes (B, N) by whole cells; returns them and the mask of the cells that became free.

    The free cells hold the codes that were pushed out on the other side, so that every cell has a valid code.
    ValueError if nothing of the picture would be left.
    """
    grid = int(codes.shape[1] ** 0.5)
    if abs(down) >= grid or abs(right) >= grid:
        raise ValueError(f"a picture of {grid} x {grid} cells is moved by less than {grid} cells, not {down} {right}")
    moved = codes.view(len(codes), grid, grid).roll((down, right), dims=(1, 2)).flatten(1)
    free = torch.zeros(grid, grid, dtype=torch.bool)
    rows, columns = _freed(down, grid), _freed(right, grid)
    free[rows], free[:, columns] = True, True
    return moved, free.flatten()


def _freed(by: int, grid: int) -> slice:
    return slice(0, by) if by >= 0 else slice(grid + by, grid)


def as_pixels(mask: Tensor, stride: int) -> Tensor:
    """A mask (N,) at the size of the picture: bool (H, W)."""
    grid = int(mask.shape[0] ** 0.5)
    return mask.view(grid, grid).repeat_interleave(stride, 0).repeat_interleave(stride, 1)
