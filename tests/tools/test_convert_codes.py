"""Converting codes there and back gives the same codes; what is broken is named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dataset.codes import CodeFolder, write_array, write_codes
from dataset.packed import CaptionCodes, PackedCodes
from tools import convert_codes
from utils.files import read_json, write_json

NUMBERS = [0, 1, 3, 4, 9]


def convert(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_codes.py", *map(str, flags)])
    convert_codes.main()


def class_files(folder: Path, codebook: int = 500) -> dict[Path, bytes]:
    """Files of two data sets, one of them with gaps; gives all their contents."""
    generator = np.random.default_rng(0)
    for name, numbers in {"imagenet": NUMBERS, "pexels": [0, 1]}.items():
        for i in numbers:
            write_codes(CodeFolder.named(folder, name, 256), i, generator.integers(0, codebook, (10, 16)), i % 3)
    return contents(folder)


def caption_files(folder: Path) -> dict[Path, bytes]:
    generator = np.random.default_rng(0)
    for stem, line in [("a", 0), ("a", 7), ("part.0002", 3)]:
        write_array(folder / stem / f"{line}.npy", generator.integers(0, 500, (1, 16)))
    return contents(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.npy")}


@pytest.mark.parametrize("make", [class_files, caption_files])
def test_there_and_back(make, tmp_path, monkeypatch):
    before = make(tmp_path / "files")
    convert(monkeypatch, "--from", tmp_path / "files", "--to", tmp_path / "packed", "--layout", "packed")
    convert(monkeypatch, "--from", tmp_path / "packed", "--to", tmp_path / "back", "--layout", "files")
    assert contents(tmp_path / "back") == before


def test_gaps_become_missing_rows_and_settings_are_kept(tmp_path, monkeypatch):
    class_files(tmp_path / "files")
    made = {"data_path": "d", "images": 10, "image_size": 256, "crops": "ten-crop 1.1", "tokenizer_sha256": "abc"}
    write_json(tmp_path / "files/extraction.json", {**made, "classes": ["x", "y", "z"]})
    convert(monkeypatch, "--from", tmp_path / "files", "--to", tmp_path / "packed", "--codebook-size", 500)
    store = PackedCodes(tmp_path / "packed/imagenet256_packed")
    assert list(store.indices()) == NUMBERS and store.manifest["missing"] == [2, 5, 6, 7, 8]
    wanted = {**made, "dataset": "imagenet", "codebook_size": 500, "classes": ["x", "y", "z"]}
    assert {name: store.manifest[name] for name in wanted} == wanted
    convert(
        monkeypatch, "--from", tmp_path / "packed/imagenet256_packed", "--to", tmp_path / "back", "--layout", "files"
    )
    assert {name: read_json(tmp_path / "back/extraction.json")[name] for name in made} == made


def test_conversion_goes_on_where_it_stopped(tmp_path, monkeypatch):
    class_files(tmp_path / "files")
    flags = ["--from", tmp_path / "files", "--to", tmp_path / "packed"]
    convert(monkeypatch, *flags)
    store = tmp_path / "packed/imagenet256_packed"
    before = {path.name: path.stat().st_mtime_ns for path in store.glob("codes-*.npy")}
    for name in ("codes-00004.json", "manifest.json"):
        (store / name).unlink()
    convert(monkeypatch, *flags)
    changed = [name for name, time in before.items() if (store / name).stat().st_mtime_ns != time]
    assert changed == ["codes-00004.npy"]
    convert(monkeypatch, "--from", tmp_path / "packed", "--to", tmp_path / "back", "--layout", "files")
    label = tmp_path / "back/imagenet256_labels/3.npy"
    time = label.stat().st_mtime_ns
    (tmp_path / "back/imagenet256_codes/9.npy").unlink()
    convert(monkeypatch, "--from", tmp_path / "packed", "--to", tmp_path / "back", "--layout", "files")
    assert label.stat().st_mtime_ns == time and contents(tmp_path / "back") == contents(tmp_path / "files")


def test_verify(tmp_path, monkeypatch, capsys):
    caption_files(tmp_path / "files")
    convert(monkeypatch, "--from", tmp_path / "files", "--to", tmp_path / "packed")
    convert(monkeypatch, "--from", tmp_path / "packed", "--verify")
    assert "t2i_packed: 3 images in 3 shards, all as written" in capsys.readouterr().out
    assert len(CaptionCodes(tmp_path / "packed")) == 3
    path = tmp_path / "packed/t2i_packed/codes-00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"codes-00001\.npy has another checksum"):
        convert(monkeypatch, "--from", tmp_path / "packed", "--verify")


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--to is missing"):
        convert(monkeypatch, "--from", tmp_path)
    with pytest.raises(ValueError, match="--from and --to are the same folder"):
        convert(monkeypatch, "--from", tmp_path, "--to", tmp_path)
    for layout, message in {"packed": "no code files", "files": "no packed store"}.items():
        with pytest.raises(FileNotFoundError, match=message):
            convert(monkeypatch, "--from", tmp_path, "--to", tmp_path / "x", "--layout", layout)
    class_files(tmp_path / "files", codebook=100_000)
    with pytest.raises(ValueError, match=r"npy holds the code \d{5}, above 65535: give --codebook-size"):
        convert(monkeypatch, "--from", tmp_path / "files", "--to", tmp_path / "a")
    convert(monkeypatch, "--from", tmp_path / "files", "--to", tmp_path / "b", "--codebook-size", 100_000)
    assert PackedCodes(tmp_path / "b/imagenet256_packed").manifest["dtype"] == "uint32"
    with pytest.raises(ValueError, match="values of 0 to 999"):
        convert(monkeypatch, "--from", tmp_path / "files", "--to", tmp_path / "c", "--codebook-size", 1000)
    write_codes(CodeFolder.named(tmp_path / "files", "imagenet", 256), 4, np.zeros((2, 16), int), 0)
    with pytest.raises(ValueError, match=r"4\.npy holds codes of the shape \(2, 16\), the first file \(10, 16\)"):
        convert(monkeypatch, "--from", tmp_path / "files", "--to", tmp_path / "d", "--codebook-size", 100_000)


def test_codes_of_two_tokenizers_are_never_mixed(tmp_path, monkeypatch):
    for name in ("one", "two"):
        class_files(tmp_path / name)
        write_json(tmp_path / name / "extraction.json", {"tokenizer_sha256": name})
        convert(monkeypatch, "--from", tmp_path / name, "--to", tmp_path / f"{name}_store")
    with pytest.raises(ValueError, match="another tokenizer_sha256"):
        convert(monkeypatch, "--from", tmp_path / "two", "--to", tmp_path / "one_store")
    convert(monkeypatch, "--from", tmp_path / "one_store", "--to", tmp_path / "back", "--layout", "files")
    with pytest.raises(ValueError, match="holds codes of another tokenizer"):
        convert(monkeypatch, "--from", tmp_path / "two_store", "--to", tmp_path / "back", "--layout", "files")
