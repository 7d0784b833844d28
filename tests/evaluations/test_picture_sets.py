"""Pictures come out of every container as they went in, a batch at a time, and bad containers are explained."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.picture_sets import NpzPictures, open_pictures, read_arrays
from evaluations.render import write_npz

PICTURES = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)


def stored(folder: Path) -> Path:
    np.savez(folder / "p.npz", mu=np.zeros(3), arr_0=PICTURES)
    return folder / "p.npz"


def compressed(folder: Path) -> Path:
    np.savez_compressed(folder / "p.npz", PICTURES)
    return folder / "p.npz"


def png_folder(folder: Path) -> Path:
    (folder / "p").mkdir()
    for i, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(folder / "p" / f"{i:06d}.png")
    return folder / "p"


def rendered(folder: Path) -> Path:
    return write_npz(png_folder(folder), len(PICTURES))


@pytest.mark.parametrize("container", [stored, compressed, png_folder, rendered])
@pytest.mark.parametrize(("numbers", "size"), [(range(11), 4), (range(3, 9), 4), (range(10, 11), 64), (range(5, 5), 2)])
def test_every_container_gives_its_pictures_in_batches(tmp_path, container, numbers, size):
    pictures = open_pictures(container(tmp_path))
    assert pictures.shape == PICTURES.shape
    batches = list(pictures.batches(numbers, size))
    assert all(batch.dtype == torch.uint8 and 0 < len(batch) <= size for batch in batches)
    got = torch.cat(batches) if batches else torch.empty(0, 6, 5, 3).byte()
    assert np.array_equal(got.numpy(), PICTURES[numbers.start : numbers.stop])


def test_stored_pictures_are_mapped_and_not_loaded(tmp_path, monkeypatch):
    path = stored(tmp_path)
    monkeypatch.setattr(np, "load", None)
    monkeypatch.setattr(NpzPictures, "_streamed", None)
    assert len(list(open_pictures(path).batches(range(11), 3))) == 4


def test_several_arrays_beside_the_pictures(tmp_path):
    found = read_arrays(stored(tmp_path), ("mu", "sigma"))
    assert list(found) == ["mu"] and np.array_equal(found["mu"], np.zeros(3))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (PICTURES.astype(np.float32) / 255, r"uint8 \(N, H, W, 3\) with values 0..255, found float32"),
        (PICTURES.transpose(0, 3, 1, 2), r"found uint8 \(11, 3, 6, 5\)"),
        (PICTURES[0], r"found uint8 \(6, 5, 3\)"),
        (PICTURES[..., :1], r"found uint8 \(11, 6, 5, 1\)"),
        (PICTURES.astype(np.int64), "found int64"),
        (np.asfortranarray(PICTURES), "Fortran order"),
        (np.array([{"a": 1}], dtype=object), "found object"),
    ],
)
def test_arrays_that_are_no_pictures(tmp_path, array, reason):
    np.savez(tmp_path / "bad.npz", array)
    with pytest.raises(ValueError, match=reason):
        open_pictures(tmp_path / "bad.npz")


def test_a_missing_array_is_named_with_those_that_are_there(tmp_path):
    np.savez(tmp_path / "bad.npz", images=PICTURES, labels=np.arange(11))
    with pytest.raises(ValueError, match=r"missing arr_0 in npz file .*, which holds images, labels"):
        open_pictures(tmp_path / "bad.npz")


def test_files_that_are_no_npz(tmp_path):
    (tmp_path / "text.npz").write_text("not found")
    with pytest.raises(ValueError, match="is not an npz file"):
        open_pictures(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError, match="expected an npz of pictures, or a folder of PNGs"):
        open_pictures(tmp_path / "none.npz")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(stored(tmp_path).read_bytes()[:700])
    with pytest.raises(ValueError, match="is not an npz file"):
        open_pictures(cut)


def test_headers_are_not_trusted(tmp_path):
    def member(content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(tmp_path / "bad.npz", "w", compression) as archive:
            archive.writestr("arr_0.npy", content)
        return tmp_path / "bad.npz"

    np.save(tmp_path / "p.npy", PICTURES)
    whole = (tmp_path / "p.npy").read_bytes()
    with pytest.raises(ValueError, match="no valid npy header"):
        open_pictures(member(b"\x93NUMPY\x09\x00"))
    with pytest.raises(ValueError, match="its shape says"):
        open_pictures(member(whole[:-1]))
    with pytest.raises(ValueError, match="its shape says"):
        open_pictures(member(whole.replace(b"(11, 6", b"(99, 6")))
    pictures = open_pictures(member(whole, zipfile.ZIP_DEFLATED))
    data = bytearray(pictures.path.read_bytes())
    data[600:620] = bytes(20)
    pictures.path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        list(open_pictures(pictures.path).batches(range(11), 4))


def test_folders_are_checked(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures in the folder"):
        open_pictures(tmp_path / "empty")
    folder = png_folder(tmp_path)
    Image.fromarray(PICTURES[0, :4]).save(folder / "000004.png")
    with pytest.raises(ValueError, match=r"000004\.png is 5x4, the first picture of the folder is 5x6"):
        list(open_pictures(folder).batches(range(11), 4))
    Image.fromarray(PICTURES[0]).save(folder / "000005.jpg")
    with pytest.raises(ValueError, match=r"PNGs alone, found 000005\.jpg: lossy"):
        open_pictures(folder)


def test_statistics_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "bad.npz", PICTURES, mu=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="holds Python objects"):
        read_arrays(tmp_path / "bad.npz", ("mu",))
