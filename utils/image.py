"""From model output to picture files, and back.

Models work on (N, 3, H, W) float images in [-1, 1]; pictures are (N, H, W, 3) uint8.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from utils.files import write_atomic


def to_uint8(images: Tensor) -> Tensor:
    """Float images (N, C, H, W) in [-1, 1] to uint8 (N, H, W, C): trunc(clamp(127.5 x + 128, 0, 255)).

    Truncation is part of the published numbers, so it stays; `to_float` followed by this is the identity.
    """
    return (127.5 * images.float() + 128).clamp(0, 255).permute(0, 2, 3, 1).byte().contiguous()


def to_float(pictures: Tensor) -> Tensor:
    """Pictures (N, H, W, C) uint8 to float32 images (N, C, H, W) in [-1, 1]."""
    return (pictures.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def resize_bicubic(images: Tensor, size: int, antialias: bool = False) -> Tensor:
    """Resize float images (N, C, H, W) to (N, C, size, size).

    The published 384 -> 256 samples were shrunk without antialiasing, hence the default. Bicubic weights
    overshoot: values may leave [-1, 1].
    """
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=antialias)


def make_grid_image(images: Tensor, columns: int, padding: int = 2) -> Image.Image:
    """One picture with all images (N, C, H, W) in [-1, 1], `columns` per row, black lines between and around.

    A single image is returned without lines. Values are rounded to the nearest level. The picture is the one that
    torchvision's `save_image` writes; it is made here because vLLM's CPU build stands beside no torchvision.
    """
    pixels = ((images.float().clamp(-1, 1) + 1) / 2).mul(255).add(0.5).clamp(0, 255).byte().cpu()
    if len(pixels) == 1:
        return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    columns = min(columns, len(pixels))
    height, width = (size + padding for size in pixels.shape[2:])
    grid = pixels.new_zeros(3, -(-len(pixels) // columns) * height + padding, columns * width + padding)
    for number, picture in enumerate(pixels):
        top, left = number // columns * height + padding, number % columns * width + padding
        grid[:, top : top + height - padding, left : left + width - padding] = picture
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def save_png(
    image: Image.Image | Tensor | np.ndarray, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write one picture, (H, W, 3) uint8 or a PIL image, as PNG; the file is whole or not there.

    `metadata` becomes text chunks of the file (``PIL.Image.open(path).text``): strings as they are,
    everything else as JSON.
    """
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray):
        _check_picture(image)
        image = Image.fromarray(image)
    write_atomic(path, lambda file: image.save(file, format="PNG", pnginfo=_chunks(metadata)))


def png_bytes(picture: np.ndarray, metadata: Mapping[str, Any] | None = None) -> bytes:
    """What `save_png` would write for a picture (H, W, 3) uint8."""
    _check_picture(picture)
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG", pnginfo=_chunks(metadata))
    return content.getvalue()


def _chunks(metadata: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        chunks.add_text(key, value if isinstance(value, str) else json.dumps(value))
    return chunks


def _check_picture(picture: np.ndarray) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture must be (H, W, 3) uint8, found {picture.shape} {picture.dtype}")
