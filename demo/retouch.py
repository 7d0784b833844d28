"""A picture to edit, and what was painted on it: uploads, paint to cells, cells to look at."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from autoregressive.sample.editing import with_rest
from autoregressive.sample.masks import as_pixels
from autoregressive.serve.cards import Card
from autoregressive.serve.parameters import open_picture
from autoregressive.serve.requests import BadRequest, Edit
from dataset.augmentation import center_crop_arr
from demo.board import data_uri
from utils.image import png_bytes

_MOST_PIXELS = 8000 * 8000  # of an upload: more than telephones make
CANVAS = 512  # pixels: pictures are painted on at least at this size
_TINT, _TINT_SHARE = (20, 184, 166), 0.65


def read_upload(path: str | Path | None, edge: int) -> np.ndarray:
    """The central square of somebody's picture, upright and on white: uint8 (edge, edge, 3).

    Raises:
        BadRequest: the file is no picture, broken or far too large.
    """
    if not path:
        raise BadRequest("No picture has arrived; choose a file again.", "image")
    upright = ImageOps.exif_transpose(open_picture(Path(path).read_bytes(), "image", _MOST_PIXELS)).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    return np.array(center_crop_arr(Image.alpha_composite(white, upright).convert("RGB"), edge))


def canvas_of(picture: np.ndarray) -> np.ndarray:
    """A picture large enough to paint on: each pixel becomes a square of equal ones."""
    times = -(-CANVAS // picture.shape[0])
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def painted_cells(painting: Mapping[str, Any] | None, grid: int) -> np.ndarray:
    """The cells in which anything is painted: bool (grid * grid,). `painting` is the value of a `gr.ImageEditor`."""
    cells = np.zeros((grid, grid), dtype=bool)
    for layer in (painting or {}).get("layers") or ():
        paint = Image.fromarray(layer[..., 3] > 127) if layer.ndim == 3 and layer.shape[2] == 4 else None
        if paint is not None and paint.getbbox():
            rows, columns = np.asarray(paint).nonzero()
            cells[rows * grid // paint.height, columns * grid // paint.width] = True
    return cells.flatten()


def edit_of(picture: np.ndarray | None, painting: Mapping[str, Any] | None, rest: bool, card: Card) -> Edit:
    """What to draw anew, at the model's size; with `rest`, also all cells after the first painted one.

    Raises:
        BadRequest: there is no picture, or nothing is painted.
    """
    if picture is None:
        raise BadRequest("Choose a picture first: one that you have drawn, or upload one.", "image")
    mask = painted_cells(painting, card.grid)
    if not mask.any():
        raise BadRequest("Nothing is painted: paint over the part of the picture to draw anew.", "mask")
    if rest:
        mask = with_rest(torch.from_numpy(mask)).numpy()
    return Edit(np.array(center_crop_arr(Image.fromarray(picture), card.edge)), mask)


def marked_html(edit: Edit) -> str:
    """The picture with the chosen cells tinted."""
    grid, picture = int(len(edit.mask) ** 0.5), canvas_of(edit.picture)
    inside = as_pixels(torch.from_numpy(edit.mask), picture.shape[0] // grid).numpy()[..., None]
    tinted = (picture * (1 - _TINT_SHARE) + np.array(_TINT) * _TINT_SHARE).astype(np.uint8)
    words = f"{int(edit.mask.sum())} of {len(edit.mask)} cells will be drawn anew"
    source = data_uri(png_bytes(np.where(inside, tinted, picture)), "png")
    return (
        f'<figure class="tile marked" data-cells="{int(edit.mask.sum())}">'
        f'<img class="picture" src="{source}" alt="{escape(words)}, tinted">'
        f"<figcaption><span>{words}</span></figcaption></figure>"
    )
