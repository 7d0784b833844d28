"""Packed code stores: what is written is read, they equal code files, and what is broken is named."""

from __future__ import annotations

import pickle
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.build import build_dataset
from dataset.codes import CodeFolder, write_codes
from dataset.imagenet import PackedDataset
from dataset.packed import CaptionCodes, PackedCodes, find_store, read_manifest
from dataset.packing import PackedWriter, shard_rows
from utils.files import read_json, write_json


def code_args(code_path: Path, image_size: int = 256, **more: int) -> Namespace:
    return Namespace(dataset="imagenet_code", code_path=str(code_path), image_size=image_size, **more)


def pack(
    folder: Path,
    codes: np.ndarray,
    labels: np.ndarray,
    missing: tuple[int, ...] = (),
    codebook_size: int | None = 100_000,
    kind: str = "class",
    finish: bool = True,
    **settings_: Any,
) -> PackedWriter:
    """A store with `codes` (n, A, T), written in shards."""
    store = PackedWriter(
        folder, kind, images=len(codes), views=codes.shape[1], tokens=codes.shape[2], codebook_size=codebook_size,
        settings={"image_size": 256, **settings_}, shard_size=3,
    )  # fmt: skip
    store.claim()
    for number, rows in enumerate(store.shards):
        store.write(number, codes[rows], labels[rows], [row for row in missing if row in rows])
    if finish:
        store.finish()
    return store


def numbered(images: int, views: int = 2, tokens: int = 4) -> np.ndarray:
    """Codes whose values say where they come from: 100 * number + 10 * view + token."""
    return np.sum(np.meshgrid(100 * np.arange(images), 10 * np.arange(views), np.arange(tokens), indexing="ij"), 0)


@given(
    images=st.integers(1, 17), views=st.sampled_from([1, 2, 10]), tokens=st.integers(1, 9),
    codebook_size=st.sampled_from([16, 2**16, 2**16 + 1, 2**20]), seed=st.integers(0, 2**31), second=st.booleans(),
    named=st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_a_store_equals_the_files(tmp_path_factory, images, views, tokens, codebook_size, seed, second, named) -> None:
    work, generator = tmp_path_factory.mktemp("equal"), np.random.default_rng(seed)
    gaps = tuple(np.flatnonzero(generator.random(images - 1) < 0.2).tolist())
    for name in ["x_ten_crop", "x_ten_crop_105"][: 1 + second] if named else ["x"]:
        codes = generator.integers(0, codebook_size, (images, views, tokens))
        labels = generator.integers(0, 5, images)
        files = CodeFolder.named(work / "files" / name, "imagenet", 256)
        for i in set(range(images)) - set(gaps):
            write_codes(files, i, codes[i], labels[i])
        pack(work / "packed" / name / "imagenet256_packed", codes, labels, gaps, codebook_size)
    name = "x_ten_crop" if named else "x"
    one, two = (build_dataset(code_args(work / layout / name)) for layout in ("files", "packed"))
    assert type(two) is PackedDataset and two.source.row(0)[0].dtype == (
        np.uint32 if codebook_size > 2**16 else np.uint16
    )
    for attribute in ("num_tokens", "num_views", "flip"):
        assert getattr(one, attribute) == getattr(two, attribute)
    assert list(one.indices) == list(two.indices) and len(one) == len(two) == images - len(gaps)
    order = generator.integers(0, len(one), 30).tolist()
    torch.manual_seed(seed)
    expected = [one[i] for i in order]
    torch.manual_seed(seed)
    for item, wanted in zip((two[i] for i in order), expected):
        assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.int64 for a, b in zip(item, wanted))
    for a, b in ((one.view(i, 0), two.view(i, 0)) for i in order):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0].shape == (tokens,)
    two.source.verify()


def test_shards_are_small_in_a_small_set() -> None:
    assert [len(rows) for rows in shard_rows(1803, 4096)] == [113] * 15 + [108]
    assert [len(rows) for rows in shard_rows(10, 4096)] == [1] * 10
    rows = shard_rows(1_281_167, 4096)
    assert len(rows) == 313 and rows[-1] == range(312 * 4096, 1_281_167)


def test_the_disk_holds_16_bits_a_code(tmp_path: Path) -> None:
    pack(tmp_path, np.zeros((96, 10, 576), int), np.zeros(96, int), codebook_size=16384)
    used = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    assert 96 * 10 * 576 * 2 < used < 1.01 * 96 * 10 * 576 * 2 + 32 * 2 * 128


def test_a_pickled_reader_carries_no_data(tmp_path: Path) -> None:
    codes = numbered(6, tokens=1000) % 5000
    pack(tmp_path, codes, np.arange(6))
    reader = PackedCodes(tmp_path)
    reader.read(5)
    data = pickle.dumps(reader)
    assert len(data) < 4000 and np.array_equal(pickle.loads(data).read(5)[0], codes[5:6])


def test_a_writable_copy_is_given_out(tmp_path: Path) -> None:
    pack(tmp_path / "imagenet256_packed", numbered(3), np.arange(3))
    dataset = build_dataset(code_args(tmp_path))
    dataset[1][0].fill_(7)
    dataset.view(1, 0)[0].fill_(7)
    assert dataset.view(1, 0)[0].tolist() == [100, 101, 102, 103]


def test_images_that_could_not_be_read_are_left_out(tmp_path: Path) -> None:
    pack(tmp_path, numbered(7), np.arange(7), missing=(0, 5))
    reader = PackedCodes(tmp_path)
    assert reader.indices() == [1, 2, 3, 4, 6] and reader.manifest["missing"] == [0, 5]
    reader.require([1, 6])
    with pytest.raises(ValueError, match="1 images are missing, the first 5"):
        reader.require([4, 5, 6])


def test_an_unfinished_store_says_how_to_finish(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet256_packed"
    store = pack(folder, numbered(7), np.arange(7), finish=False)
    (folder / "codes-00004.json").unlink()
    with pytest.raises(ValueError, match=r"not finished \(6 of 7 shards are there\): start the same extraction again"):
        build_dataset(code_args(tmp_path))
    with pytest.raises(ValueError, match="lacks 1 of 7 shards, the first 4"):
        store.finish()
    assert [store.has(shard) for shard in range(7)] == [True] * 4 + [False] + [True] * 2


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [
        ("codes-00001.npy", 130, "has 130 bytes"),
        ("labels-00001.npy", 8, "has 8 bytes"),
        ("codes-00000.npy", None, "is missing"),
    ],
)
def test_truncated_and_missing_shards_are_named_at_once(tmp_path: Path, file, size, message) -> None:
    store = pack(tmp_path, numbered(60), np.arange(60))
    path = tmp_path / file
    path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{file} {message}.*; copy it again, or start its extraction again"):
        PackedCodes(tmp_path)
    assert not store.has(int(file[-5])) and store.has(2)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    store = pack(tmp_path, numbered(60), np.arange(60))
    path = tmp_path / "codes-00003.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader = PackedCodes(tmp_path)
    with pytest.raises(ValueError, match=r"codes-00003\.npy has another checksum"):
        reader.verify()
    assert not store.has(3)


def test_files_that_do_not_fit_the_manifest_are_named(tmp_path: Path) -> None:
    pack(tmp_path, numbered(6), np.arange(6))
    manifest = read_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", {**manifest, "tokens": 5})
    with pytest.raises(ValueError, match=r"codes-00000\.npy must hold uint32 \(1, 2, 5\), found uint32 \(1, 2, 4\)"):
        PackedCodes(tmp_path).read(0)
    write_json(tmp_path / "manifest.json", {**manifest, "format": 2})
    with pytest.raises(ValueError, match="has the format 2, this version reads 1"):
        PackedCodes(tmp_path)
    with pytest.raises(ValueError, match="holds codes by class, expected codes by caption"):
        write_json(tmp_path / "manifest.json", manifest)
        PackedCodes(tmp_path, "caption")


def test_codes_outside_the_vocabulary(tmp_path: Path) -> None:
    pack(tmp_path / "a" / "imagenet256_packed", numbered(3), np.arange(3), codebook_size=512)
    with pytest.raises(
        ValueError, match=r"codebook with 512 entries, more than the vocabulary of 500; .*--vocab-size 512"
    ):
        build_dataset(code_args(tmp_path / "a", vocab_size=500))
    pack(tmp_path / "b" / "imagenet256_packed", numbered(3), np.arange(3), codebook_size=None)
    dataset = build_dataset(code_args(tmp_path / "b", vocab_size=200, num_classes=2))
    assert dataset[1][0].shape == (1, 4)
    with pytest.raises(ValueError, match=r"row 2: codes must hold values of 0 to 199, found 2[01]3"):
        dataset[2]
    with pytest.raises(ValueError, match=r"row 2: labels must hold values of 0 to 1, found 2"):
        build_dataset(code_args(tmp_path / "b", num_classes=2))[2]
    with pytest.raises(ValueError, match="codes must lie between 0 and 99, found 100 to 113"):
        pack(tmp_path / "c", numbered(3), np.arange(3), codebook_size=100).finish()


def test_verify_compares_codes_and_labels_with_the_limits(tmp_path: Path) -> None:
    pack(tmp_path, numbered(3), np.arange(3), classes=["a", "b"])
    with pytest.raises(ValueError, match="shard 2 holds labels from 2 to 2"):
        PackedCodes(tmp_path).verify()
    write_json(tmp_path / "manifest.json", {**read_manifest(tmp_path), "codebook_size": 200, "classes": []})
    with pytest.raises(ValueError, match="shard 2 holds the code 213 of a codebook of 200"):
        PackedCodes(tmp_path).verify()


def test_other_settings_are_not_mixed(tmp_path: Path) -> None:
    pack(tmp_path, numbered(3), np.arange(3), tokenizer_sha256="one", data_path="here")
    pack(tmp_path, numbered(3), np.arange(3), tokenizer_sha256="one", data_path="moved")
    with pytest.raises(ValueError, match=r"made with another tokenizer_sha256 \(one, now two\)"):
        pack(tmp_path, numbered(3), np.arange(3), tokenizer_sha256="two")


def test_the_second_crop_range_is_checked(tmp_path: Path) -> None:
    first, second = (tmp_path / f"x_ten_crop{end}" / "imagenet256_packed" for end in ("", "_105"))
    pack(first, numbered(3), np.arange(3), tokenizer_sha256="one")
    dataset = build_dataset(code_args(tmp_path / "x_ten_crop"))
    assert dataset.second is None
    pack(second, numbered(3), np.arange(3), tokenizer_sha256="two")
    with pytest.raises(ValueError, match="differ in tokenizer_sha256: one and two"):
        build_dataset(code_args(tmp_path / "x_ten_crop"))
    shutil.rmtree(second)
    pack(second, numbered(3), np.arange(3), missing=(1,), tokenizer_sha256="one")
    with pytest.raises(ValueError, match=r"x_ten_crop_105.* 1 images are missing, the first 1"):
        build_dataset(code_args(tmp_path / "x_ten_crop"))


def test_finding_the_store(tmp_path: Path) -> None:
    assert find_store(tmp_path, 256) is None
    pack(tmp_path / "openmoji256_packed", numbered(3), np.arange(3))
    assert find_store(tmp_path, 256).name == "openmoji256_packed" and find_store(tmp_path, 56) is None
    pack(tmp_path / "pexels256_packed", numbered(3), np.arange(3))
    with pytest.raises(ValueError, match="openmoji256_packed, pexels256_packed"):
        find_store(tmp_path, 256)
    pack(tmp_path / "imagenet256_packed", numbered(2), np.arange(2))
    assert len(build_dataset(code_args(tmp_path))) == 2
    assert len(build_dataset(code_args(tmp_path / "pexels256_packed"))) == 3
    with pytest.raises(ValueError, match="holds codes of 256 pixels, --image-size is 384"):
        build_dataset(code_args(tmp_path / "pexels256_packed", 384))


def test_captions_are_read_by_list_and_line(tmp_path: Path) -> None:
    keys = np.array([[0, 0], [0, 2], [-1, -1], [1, 5], [1, 7]])
    pack(tmp_path / "one_packed", numbered(5, views=1), keys, missing=(2,), kind="caption", stems=["b", "a.x"])
    pack(tmp_path / "two_packed", numbered(1, views=1), np.array([[0, 3]]), kind="caption", stems=["c"])
    codes = CaptionCodes(tmp_path)
    assert codes.keys == [("a.x", 5), ("a.x", 7), ("b", 0), ("b", 2), ("c", 3)] and len(codes) == 5
    assert codes.read("b", 2).tolist() == [[100, 101, 102, 103]] and codes.read("a.x", 7).tolist() == [
        [400, 401, 402, 403]
    ]
    assert codes.read("c", 3).tolist() == [[0, 1, 2, 3]] and codes.read("b", 0).dtype == np.int64
    for stem, line in [("b", 1), ("c", 4), ("d", 0), ("b", -1)]:
        with pytest.raises(ValueError, match=f"no codes of line {line} of the list '{stem}'"):
            codes.read(stem, line)
    with pytest.raises(ValueError, match="codes must hold values of 0 to 399, found 403"):
        codes.read("a.x", 7, vocab_size=400)
    pack(tmp_path / "three_packed", numbered(1, views=1), np.array([[0, 3]]), kind="caption", stems=["c"])
    with pytest.raises(ValueError, match="both hold codes of 'c'"):
        CaptionCodes(tmp_path)
    with pytest.raises(FileNotFoundError, match="no packed store"):
        CaptionCodes(tmp_path / "nowhere")


def test_the_note_of_each_shard_says_what_it_holds(tmp_path: Path) -> None:
    pack(tmp_path, numbered(60), np.arange(60), missing=(4,))
    note = read_json(tmp_path / "codes-00001.json")
    assert (note["first"], note["count"], note["missing"]) == (3, 3, [4])
    assert set(note["files"]) == {"codes", "labels"} and len(note["files"]["codes"]["sha256"]) == 64
