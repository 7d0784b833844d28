"""Sets of pictures in an npz, a folder of PNGs or an array, read in batches and never as a whole."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from dataset.images import is_image_name, read_rgb

ARRAY = "arr_0"
_READERS = 8  # threads that decode PNGs


class PictureSet(Protocol):
    """Pictures of one size: `shape` is (count, height, width, 3)."""

    path: Path
    shape: tuple[int, int, int, int]

    def batches(self, numbers: range, size: int) -> Iterator[Tensor]:
        """The pictures with these consecutive numbers, uint8 (n, H, W, 3) with n <= size."""
        ...


def open_pictures(path: str | Path) -> PictureSet:
    """Open an npz with the array ``arr_0``, or a folder of PNGs.

    Raises:
        FileNotFoundError: when there is nothing at `path`.
        ValueError: when it holds something else than uint8 pictures (N, H, W, 3).
    """
    path = Path(path)
    if path.is_dir():
        return PictureFolder(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected an npz of pictures, or a folder of PNGs")
    return NpzPictures(path)


class NpzPictures:
    """The pictures in an npz: memory-mapped where they are stored plainly, decompressed on the way otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_archive(path) as archive:
            if f"{ARRAY}.npy" not in archive.namelist():
                held = ", ".join(sorted(name.removesuffix(".npy") for name in archive.namelist())) or "nothing"
                raise ValueError(f"missing {ARRAY} in npz file {path}, which holds {held}")
            entry = archive.getinfo(f"{ARRAY}.npy")
            with archive.open(entry) as file:
                self.shape, dtype = _header(file, path)
                start = file.tell()
        if len(self.shape) != 4 or self.shape[-1] != 3 or dtype != np.uint8:
            raise ValueError(
                f"{path} must hold pictures uint8 (N, H, W, 3) with values 0..255, found {dtype} {self.shape}"
            )
        self._bytes = start + math.prod(self.shape)
        if entry.file_size != self._bytes:
            raise ValueError(f"{path} is damaged: {ARRAY} has {entry.file_size} bytes, its shape says {self._bytes}")
        self._start = start
        self._stored = entry.compress_type == zipfile.ZIP_STORED

    def batches(self, numbers: range, size: int) -> Iterator[Tensor]:
        return self._mapped(numbers, size) if self._stored else self._streamed(numbers, size)

    def _mapped(self, numbers: range, size: int) -> Iterator[Tensor]:
        with open_archive(self.path) as archive:
            offset = _data_offset(self.path, archive.getinfo(f"{ARRAY}.npy"))
        pictures = np.memmap(self.path, np.uint8, "r", offset + self._start, self.shape)
        for first in range(numbers.start, numbers.stop, size):
            yield torch.from_numpy(np.array(pictures[first : min(first + size, numbers.stop)]))

    def _streamed(self, numbers: range, size: int) -> Iterator[Tensor]:
        each = math.prod(self.shape[1:])
        with open_archive(self.path) as archive, archive.open(f"{ARRAY}.npy") as file:
            _skip(file, self._start + numbers.start * each)
            for first in range(numbers.start, numbers.stop, size):
                count = min(size, numbers.stop - first)
                data = _read(file, count * each, self.path)
                yield torch.from_numpy(np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:]).copy())


class PictureFolder:
    """The pictures in a folder, sorted by name. All must have one size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = sorted(file for file in path.iterdir() if is_image_name(file.name))
        if not self.files:
            raise ValueError(f"there are no pictures in the folder {path}")
        lossy = next((file for file in self.files if file.suffix.lower() != ".png"), None)
        if lossy is not None:
            raise ValueError(f"{path} must hold PNGs alone, found {lossy.name}: lossy files change every metric")
        first = read_rgb(self.files[0])
        self.shape = (len(self.files), first.height, first.width, 3)

    def batches(self, numbers: range, size: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(numbers.start, numbers.stop, size):
                files = self.files[first : min(first + size, numbers.stop)]
                yield torch.from_numpy(np.stack(list(readers.map(self._read, files))))

    def _read(self, file: Path) -> np.ndarray:
        picture = np.asarray(read_rgb(file))
        if picture.shape != self.shape[1:]:
            raise ValueError(f"{file} is {picture.shape[1]}x{picture.shape[0]}, the first picture of the folder is "
                             f"{self.shape[2]}x{self.shape[1]}")  # fmt: skip
        return picture


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open an npz.

    Raises:
        ValueError: when it is none, or cut short.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not an npz file, or is damaged ({error})") from error


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an npz has; numbers only, nothing is unpickled."""
    with open_archive(path):  # for the error
        pass
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names if name in stored.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged, or holds Python objects in {', '.join(names)} ({error})") from error


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a npy stream, which is read up to its first value."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged: {ARRAY} has no valid npy header ({error})") from error
    if fortran:
        raise ValueError(f"{path} holds {ARRAY} in Fortran order; save it with np.ascontiguousarray")
    return shape, dtype


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored zip member begin: behind its local header, whose two lengths vary."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: {entry.filename} has no header")
    return entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")


def _skip(file: IO[bytes], count: int) -> None:
    while count and (skipped := len(file.read(min(count, 2**24)))):
        count -= skipped


def _read(file: IO[bytes], count: int, path: Path) -> bytes:
    try:
        data = file.read(count)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if len(data) != count:
        raise ValueError(f"{path} is damaged: it ends in the middle of a picture")
    return data
