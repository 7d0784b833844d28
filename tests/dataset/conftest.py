"""Small data sets made on the spot."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import golden


@pytest.fixture
def golden_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the goldens as working directory: their lists name pictures relative to it."""
    monkeypatch.chdir(golden.FOLDER)
    return golden.FOLDER


@pytest.fixture
def save_image() -> Callable[..., Path]:
    """A function that saves an image of one grey value."""

    def save(path: Path, grey: int = 128, size: tuple[int, int] = (40, 40)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (grey, grey, grey)).save(path)
        return path

    return save


@pytest.fixture
def class_folders(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    """Six images in three classes; the image with number i is of grey 10 * i."""
    for number in range(6):
        save_image(tmp_path / "images" / "abc"[number // 2] / f"{number}.png", grey=10 * number)
    return tmp_path / "images"


@pytest.fixture
def huge_png(tmp_path: Path) -> Path:
    """A valid header that announces 65000 x 65000 pixels, and hardly any data."""
    path = tmp_path / "huge.png"
    Image.new("RGB", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = np.array([65000, 65000], ">u4").tobytes()
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)
    return path
