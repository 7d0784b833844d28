"""Code files and the class-conditional code reader."""

from __future__ import annotations

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.build import build_dataset
from dataset.codes import CodeFolder, numbered_files, read_integers, write_array, write_codes
from dataset.imagenet import CustomDataset
from tests import golden


def code_args(code_path: Path, image_size: int = 256, **more: int) -> Namespace:
    return Namespace(dataset="imagenet_code", code_path=str(code_path), image_size=image_size, **more)


def write_set(
    code_path: Path, numbers: list[int], views: int = 2, tokens: int = 4, name: str = "imagenet"
) -> CodeFolder:
    """Codes whose values say where they come from: 100 * number + 10 * view + token."""
    folder = CodeFolder.named(code_path, name, 256)
    for number in numbers:
        codes = 100 * number + 10 * np.arange(views)[:, None] + np.arange(tokens)
        write_codes(folder, number, codes, label=number % 7)
    return folder


@golden.cases("data.code_dataset")
def test_code_reader(case: golden.Case, golden_folder: Path) -> None:
    dataset = build_dataset(code_args(case.params["code_path"], case.params["image_size"]))
    torch.manual_seed(case.params["seed"])
    outputs = {"flip": dataset.flip, "has_aug_dir": dataset.aug_feature_dir is not None}
    for place, index in enumerate(case.params["order"]):
        outputs[f"item{place}.features"], outputs[f"item{place}.labels"] = dataset[index]
    case.check(outputs, skip=("len",))
    assert len(dataset) == 4  # departs from `len` of the golden: files are counted, not assumed to be 1,281,167


def test_attributes_of_the_log_line(tmp_path: Path) -> None:
    write_set(tmp_path / "c2i_flip_ten_crop", [0, 1], views=10)
    write_set(tmp_path / "c2i_flip_ten_crop_105", [0, 1], views=10)
    dataset = build_dataset(code_args(tmp_path / "c2i_flip_ten_crop"))
    assert dataset.flip
    assert dataset.feature_dir == str(tmp_path / "c2i_flip_ten_crop" / "imagenet256_codes")
    assert dataset.label_dir == str(tmp_path / "c2i_flip_ten_crop" / "imagenet256_labels")
    assert dataset.aug_feature_dir == str(tmp_path / "c2i_flip_ten_crop_105" / "imagenet256_codes")
    assert dataset.aug_label_dir == str(tmp_path / "c2i_flip_ten_crop_105" / "imagenet256_labels")
    assert dataset.feature_files == dataset.label_files == ["0.npy", "1.npy"]


def test_written_codes_have_the_established_layout(tmp_path: Path) -> None:
    folder = CodeFolder.named(tmp_path, "imagenet", 256)
    write_codes(folder, 3, torch.arange(8, dtype=torch.int32).reshape(2, 4), label=5)
    codes, label = (
        np.load(tmp_path / "imagenet256_codes/3.npy"),
        np.load(tmp_path / "imagenet256_labels/3.npy"),
    )
    assert codes.dtype == label.dtype == np.int64
    assert codes.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]] and label.tolist() == [5]
    assert folder.has(3) and not folder.has(0)
    with pytest.raises(ValueError, match=r"shape \(A, T\)"):
        write_codes(folder, 4, np.arange(4), label=0)


def test_an_interrupted_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path, [0])

    def stop(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    for number in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            write_codes(folder, number, np.full((2, 4), 9), label=0)
    assert numbered_files(folder.codes) == [0] and not folder.has(1)
    assert folder.read(0)[0].tolist() == [[[0, 1, 2, 3], [10, 11, 12, 13]]]


def test_a_view_is_picked_whatever_the_path_is_called(tmp_path: Path) -> None:
    write_set(tmp_path / "output", [0], views=10)
    dataset = build_dataset(code_args(tmp_path / "output"))
    drawn = [dataset[0] for _ in range(100)]
    assert all(codes.shape == (1, 4) and label.shape == (1,) for codes, label in drawn)
    assert {int(codes[0, 0]) // 10 for codes, _ in drawn} == set(range(10))
    assert all(codes.dtype == label.dtype == torch.int64 for codes, label in drawn)


def test_one_view_is_returned_whole(tmp_path: Path) -> None:
    write_set(tmp_path / "flip", [0], views=1)
    dataset = build_dataset(code_args(tmp_path / "flip"))
    assert dataset[0][0].tolist() == [[[0, 1, 2, 3]]] and not dataset.flip


def test_items_follow_the_numbers_and_gaps_are_allowed(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [0, 2, 10, 9], views=1)
    (folder.codes / ".5.npy.123.tmp").write_bytes(b"left by a killed process")
    (folder.codes / "notes.npy").write_bytes(b"no number")
    dataset = build_dataset(code_args(tmp_path))
    assert len(dataset) == 4
    assert [int(codes[0, 0, 0]) for codes, _ in dataset_items(dataset)] == [0, 200, 900, 1000]
    assert [int(label) for _, label in dataset_items(dataset)] == [0, 2, 2, 3]


def dataset_items(dataset: CustomDataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [dataset[index] for index in range(len(dataset))]


def test_both_crop_sets_are_read_equally_often(tmp_path: Path) -> None:
    write_set(tmp_path / "x_ten_crop", [0], views=1)
    second = write_set(tmp_path / "x_ten_crop_105", [0], views=1)
    write_codes(second, 0, np.full((1, 4), 7), label=0)
    dataset = build_dataset(code_args(f"{tmp_path}/x_ten_crop/"))
    torch.manual_seed(0)
    sevens = sum(int(dataset[0][0][0, 0, 0]) == 7 for _ in range(400))
    assert 160 < sevens < 240


def test_an_incomplete_second_set_is_found_at_once(tmp_path: Path) -> None:
    write_set(tmp_path / "x_ten_crop", [0, 1, 2])
    write_set(tmp_path / "x_ten_crop_105", [0])
    with pytest.raises(ValueError, match=r"x_ten_crop_105.*2 files are missing, the first 1\.npy"):
        build_dataset(code_args(tmp_path / "x_ten_crop"))
    shutil.rmtree(tmp_path / "x_ten_crop_105" / "imagenet256_labels")
    with pytest.raises(FileNotFoundError, match=r"no companion .*imagenet256_labels"):
        build_dataset(code_args(tmp_path / "x_ten_crop"))


def test_ten_crop_elsewhere_in_the_path_does_not_count(tmp_path: Path) -> None:
    write_set(tmp_path / "all_ten_crop" / "mine", [0])
    write_set(tmp_path / "all_ten_crop_105" / "mine", [0])
    dataset = build_dataset(code_args(tmp_path / "all_ten_crop" / "mine"))
    assert dataset.aug_feature_dir == dataset.feature_dir


def test_codes_of_another_data_set_are_found(tmp_path: Path) -> None:
    write_set(tmp_path, [0, 1], name="openmoji")
    write_set(tmp_path / "x", [0], name="set1")  # "set1256_codes" is not a folder of size 256
    assert len(build_dataset(code_args(tmp_path))) == 2
    with pytest.raises(FileNotFoundError, match=r"no folder \*256_codes"):
        build_dataset(code_args(tmp_path / "x"))
    write_set(tmp_path, [0], name="pexels")
    with pytest.raises(ValueError, match="openmoji256_codes, pexels256_codes"):
        build_dataset(code_args(tmp_path))
    write_set(tmp_path, [0, 1, 2])
    assert len(build_dataset(code_args(tmp_path))) == 3  # imagenet comes first


def test_missing_folders_and_labels(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="extract codes of this image size"):
        build_dataset(code_args(tmp_path / "nowhere"))
    folder = write_set(tmp_path, [0, 1])
    (folder.labels / "1.npy").unlink()
    with pytest.raises(ValueError, match=r"imagenet256_labels is incomplete: 1 files are missing, the first 1\.npy"):
        build_dataset(code_args(tmp_path))
    shutil.rmtree(folder.codes)
    folder.codes.mkdir()
    with pytest.raises(FileNotFoundError, match="no code files"):
        build_dataset(code_args(tmp_path))


def _pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


BAD_CODES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled array": (_pickled, "cannot read .*1.npy"),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "cannot read .*1.npy"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read .*1.npy"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot read .*1.npy"),
    "flat": (lambda path: np.save(path, np.arange(4)), r"shape \(1, any, any\), found \(4,\)"),
    "two images": (lambda path: np.save(path, np.zeros((2, 2, 4), np.int64)), r"found \(2, 2, 4\)"),
    "no tokens": (lambda path: np.save(path, np.zeros((1, 2, 0), np.int64)), r"found \(1, 2, 0\)"),
    "floats": (lambda path: np.save(path, np.zeros((1, 2, 4))), "must hold integers, found float64"),
    "negative": (lambda path: np.save(path, np.full((1, 2, 4), -1)), "values of 0 to 199, found -1 to -1"),
    "too large": (
        lambda path: np.save(path, np.full((1, 2, 4), 200)),
        "values of 0 to 199, found 200 to 200",
    ),
    "more tokens": (
        lambda path: np.save(path, np.zeros((1, 2, 9), np.int64)),
        "9 tokens per view, the first file 4",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_CODES.values(), ids=BAD_CODES.keys())
def test_bad_code_files_are_named(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    folder = write_set(tmp_path, [0, 1])
    spoil(folder.codes / "1.npy")
    dataset = build_dataset(code_args(tmp_path, vocab_size=200, num_classes=7))
    assert dataset[0][0].shape == (1, 4)
    with pytest.raises(ValueError, match=message):
        dataset[1]


def test_labels_beyond_the_classes_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, [0, 1])
    dataset = build_dataset(code_args(tmp_path, num_classes=1))
    assert int(dataset[0][1]) == 0
    with pytest.raises(ValueError, match=r"labels/1\.npy must hold values of 0 to 0, found 1 to 1"):
        dataset[1]


def test_small_integer_types_are_read_as_int64(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([[65535]], np.uint16))
    array = read_integers(tmp_path / "0.npy", (1, None))
    assert array.dtype == np.int64 and array.item() == 65535
    write_array(tmp_path / "1.npy", torch.tensor([3], dtype=torch.uint8))
    assert np.load(tmp_path / "1.npy").dtype == np.int64


def test_an_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    (tmp_path / "x.npz").rename(tmp_path / "0.npy")
    with pytest.raises(ValueError, match="found an archive"):
        read_integers(tmp_path / "0.npy", (None,))
