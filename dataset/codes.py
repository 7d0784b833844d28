"""Code files: the one home for reading and writing codes in the established layout, one file per image.

Large sets are better packed (dataset/packed.py); tools/convert_codes.py turns either into the other.

Class-conditional, one pair of files per image, i being the number of the image in its sorted folder:

    {code_path}/{dataset}{image_size}_codes/{i}.npy     int64 (1, A, T): A views of the image, T tokens each
    {code_path}/{dataset}{image_size}_labels/{i}.npy    int64 (1,): class

Text-conditional, one file per line of a caption list:

    {code_path}/{list stem}/{line}.npy                  int64 (1, T)

Files are written whole or not at all. The codes of an image are written after its label, so a code file says
that the image is done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.files import write_atomic


def write_array(path: str | Path, array: np.ndarray | Tensor) -> None:
    """Write integers as one int64 .npy file, atomically."""
    array = np.asarray(array.cpu() if isinstance(array, Tensor) else array, dtype=np.int64)
    write_atomic(path, lambda file: np.save(file, array, allow_pickle=False))


def read_array(path: str | Path, kinds: str = "iu") -> np.ndarray:
    """Read one .npy file whose dtype is of one of `kinds` (NumPy's letters: i, u integers, f floats).

    Raises:
        ValueError: when the file is missing, cut short, pickled or of another dtype.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path} ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"cannot read {path}: expected one array, found an archive")
    if array.dtype.kind not in kinds:
        wanted = "integers" if kinds == "iu" else "floats"
        raise ValueError(f"{path} must hold {wanted}, found {array.dtype}")
    return array


def read_integers(path: str | Path, shape: tuple[int | None, ...], below: int | None = None) -> np.ndarray:
    """Read an int64 array of `shape` (None: any length) with values in 0 .. below - 1 (None: no upper limit).

    Raises:
        ValueError: when the file is unreadable or its shape, dtype or values are wrong.
    """
    array = read_array(path)
    fits = len(array.shape) == len(shape) and all(w in (None, n) for n, w in zip(array.shape, shape))
    if not fits or array.size == 0:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{path} must have the shape ({wanted}), found {array.shape}")
    if array.min() < 0 or (below is not None and array.max() >= below):
        limit = "0 or more" if below is None else f"0 to {below - 1}"
        raise ValueError(f"{path} must hold values of {limit}, found {array.min()} to {array.max()}")
    return array.astype(np.int64, copy=False)


def numbered_files(folder: str | Path) -> list[int]:
    """The sorted numbers i of all files `{i}.npy` in `folder`; other files do not count."""
    names = (entry.name for entry in os.scandir(folder))
    return sorted(int(name[:-4]) for name in names if re.fullmatch(r"\d+\.npy", name))


@dataclass(frozen=True)
class CodeFolder:
    """The two folders of a class-conditional set of codes."""

    codes: Path
    labels: Path

    @classmethod
    def named(cls, code_path: str | Path, dataset: str, image_size: int) -> CodeFolder:
        """The folders that extraction writes for the data set called `dataset`."""
        stem = f"{dataset}{image_size}"
        return cls(Path(code_path, f"{stem}_codes"), Path(code_path, f"{stem}_labels"))

    @classmethod
    def find(cls, code_path: str | Path, image_size: int) -> CodeFolder:
        """The folders to read below `code_path`: those of imagenet, else the only ones of that image size.

        Raises:
            FileNotFoundError: when there are none.
            ValueError: when several data sets have codes of that size there.
        """
        established = cls.named(code_path, "imagenet", image_size)
        if established.codes.is_dir():
            return established
        pattern = re.compile(rf"(.*\D|){image_size}_codes")
        found = [path.name for path in sorted(Path(code_path).glob("*_codes")) if pattern.fullmatch(path.name)]
        if not found:
            raise FileNotFoundError(
                f"no folder *{image_size}_codes in {code_path}; extract codes of this image size first "
                "(scripts/autoregressive/extract_codes_c2i.sh)"
            )
        if len(found) > 1:
            raise ValueError(
                f"{code_path} holds codes of several data sets ({', '.join(found)}); keep one in each folder"
            )
        return cls.named(code_path, found[0].removesuffix(f"{image_size}_codes"), image_size)

    def sibling_105(self) -> CodeFolder:
        """The folders of the second crop range: `..._ten_crop_105` beside `..._ten_crop`, else these."""
        parent = self.codes.parent
        if not parent.name.endswith("ten_crop"):
            return self
        other = parent.with_name(f"{parent.name}_105")
        return CodeFolder(other / self.codes.name, other / self.labels.name)

    def exists(self) -> bool:
        """True when both folders are there.

        Raises:
            FileNotFoundError: when only one of them is.
        """
        present = [folder.is_dir() for folder in (self.codes, self.labels)]
        if any(present) and not all(present):
            there, missing = (self.codes, self.labels) if present[0] else (self.labels, self.codes)
            raise FileNotFoundError(f"{there} has no companion {missing}; extract the codes again")
        return all(present)

    def indices(self) -> list[int]:
        """The sorted numbers of the extracted images.

        Raises:
            FileNotFoundError: when a folder is missing or empty.
            ValueError: when images have codes but no label.
        """
        if not self.exists() or not (indices := numbered_files(self.codes)):
            raise FileNotFoundError(f"no code files in {self.codes}; run scripts/autoregressive/extract_codes_c2i.sh")
        _require(indices, numbered_files(self.labels), self.labels)
        return indices

    def require(self, indices: Iterable[int]) -> None:
        """Check that all of `indices` have been extracted.

        Raises:
            ValueError: when one is missing.
        """
        _require(indices, self.indices(), self.codes)

    def has(self, index: int) -> bool:
        """True when image `index` has been extracted; its label is then there too."""
        return (self.codes / f"{index}.npy").is_file()

    def read(
        self, index: int, vocab_size: int | None = None, num_classes: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes (1, A, T) and label (1,) of image `index`, int64, checked against the limits given."""
        codes = read_integers(self.codes / f"{index}.npy", (1, None, None), vocab_size)
        return codes, read_integers(self.labels / f"{index}.npy", (1,), num_classes)


def _require(indices: Iterable[int], present: Iterable[int], folder: Path) -> None:
    missing = sorted(set(indices) - set(present))
    if missing:
        raise ValueError(
            f"{folder} is incomplete: {len(missing)} files are missing, the first {missing[0]}.npy; "
            "finish the extraction or move the folder away"
        )


def write_codes(folder: CodeFolder, index: int, codes: np.ndarray | Tensor, label: int) -> None:
    """Write image `index`: `codes` (A, T) or (1, A, T), any integer dtype.

    Raises:
        ValueError: when `codes` has another shape.
    """
    codes = np.asarray(codes.cpu() if isinstance(codes, Tensor) else codes)
    codes = codes[None] if codes.ndim == 2 else codes
    if codes.ndim != 3 or len(codes) != 1:
        raise ValueError(f"codes must have the shape (A, T) or (1, A, T), found {codes.shape}")
    write_array(folder.labels / f"{index}.npy", np.array([int(label)]))
    write_array(folder.codes / f"{index}.npy", codes)


def caption_codes_path(code_path: str | Path, stem: str, line: int) -> Path:
    """The code file of line `line` of the caption list `stem`."""
    return Path(code_path, stem, f"{line}.npy")


class CaptionFiles:
    """Code files of caption lists at any (list stem, line); every file below `code_path` is one.

    `tokens`, when given, is the T that each must have.

    Attributes:
        keys: (stem, line) of every file, lists sorted by name, lines by number.

    Raises:
        FileNotFoundError: when there are none.
    """

    views = 1

    def __init__(self, code_path: str | Path, tokens: int | None = None) -> None:
        self.code_path, self.tokens = Path(code_path), tokens
        folders = sorted(path for path in self.code_path.iterdir() if path.is_dir()) if self.code_path.is_dir() else []
        self.keys = [(folder.name, line) for folder in folders for line in numbered_files(folder)]
        if not self.keys:
            raise FileNotFoundError(f"no code files in {code_path}; run autoregressive/train/extract_codes_t2i.py")

    def read(self, stem: str, line: int, vocab_size: int | None = None, view: int = 0) -> np.ndarray:
        """The codes of one record, int64 (1, T); a file holds view 0 alone.

        Raises:
            ValueError: when it is unreadable, of another T or outside the vocabulary.
        """
        return read_integers(caption_codes_path(self.code_path, stem, line), (1, self.tokens), vocab_size)
