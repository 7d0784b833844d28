"""The names of the data sets, and the readers of plain image collections."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dataset.augmentation import eval_transform
from dataset.build import BUILDERS, build_dataset
from dataset.coco import SingleFolderDataset
from dataset.openimage import DatasetJson
from tests.dataset.test_images import grey

TRANSFORM = eval_transform(8)


def test_names() -> None:
    assert set(BUILDERS) == {
        "imagenet", "imagenet_code", "coco", "openimage", "pexels", "t2i_image", "tars", "t2i", "t2i_code",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no dataset 'imagnet'; choose one of imagenet"):
        build_dataset(Namespace(dataset="imagnet"))


@pytest.mark.parametrize("name", ["imagenet_code", "t2i_code"])
def test_code_sets_take_no_transform(name: str) -> None:
    with pytest.raises(TypeError, match="transform"):
        build_dataset(Namespace(dataset=name), transform=TRANSFORM)


@pytest.mark.parametrize("name", ["imagenet", "coco", "openimage", "pexels", "t2i_image", "tars", "t2i"])
def test_image_sets_need_a_transform(name: str) -> None:
    with pytest.raises(TypeError, match="transform"):
        build_dataset(Namespace(dataset=name))


@pytest.mark.parametrize("name", ["imagenet", "pexels"])
def test_class_folders(name: str, class_folders: Path) -> None:
    dataset = build_dataset(Namespace(dataset=name, data_path=str(class_folders)), transform=TRANSFORM)
    assert len(dataset) == 6
    image, label = dataset[4]
    assert image.shape == (3, 8, 8) and grey(image) == 40
    assert type(label) is int and label == 2


def test_single_folder_is_sorted_and_filtered(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    for name, value in [("b.png", 2), ("a.jpg", 1), ("c.JPEG", 3), ("10.png", 0), ("sub/d.png", 9)]:
        save_image(tmp_path / name, grey=value)
    for junk in (".DS_Store", "list.txt", "._b.png"):
        (tmp_path / junk).write_bytes(b"junk")
    (tmp_path / "folder.png").mkdir()
    dataset = build_dataset(Namespace(dataset="coco", data_path=str(tmp_path)), transform=TRANSFORM)
    assert [grey(image) for image, _ in (dataset[i] for i in range(len(dataset)))] == [0, 1, 2, 3]
    label = dataset[0][1]
    assert torch.equal(label, torch.tensor(0)) and label.dtype == torch.int64
    assert SingleFolderDataset(tmp_path)[0][0].mode == "RGB"


def test_single_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        SingleFolderDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no image files"):
        SingleFolderDataset(tmp_path)


def test_listed_images(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    names = [f"openimages_0001/{number}.png" for number in range(200)]
    for number, name in enumerate(names):
        save_image(tmp_path / name, grey=number, size=(8, 8))
    (tmp_path / names[3]).write_bytes(b"broken")
    (tmp_path / names[4]).unlink()
    (tmp_path / "image_paths.json").write_text(json.dumps(names))
    dataset = build_dataset(Namespace(dataset="openimage", data_path=str(tmp_path)), transform=TRANSFORM)
    assert len(dataset) == 200
    image, label = dataset[3]
    assert grey(image) == 5 and torch.equal(label, torch.tensor(0))
    assert dataset.bad.indices() == [3, 4]
    (tmp_path / names[7]).unlink()
    with pytest.raises(ValueError, match="3 of 200 items cannot be read"):
        dataset[7]


@pytest.mark.parametrize("content", ["{}", "[]", "[1, 2]", "not json"])
def test_bad_lists_of_images(tmp_path: Path, content: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"tools/openimage_json.py"):
        DatasetJson(tmp_path)
    (tmp_path / "image_paths.json").write_text(content)
    with pytest.raises(ValueError, match=r"image_paths\.json"):
        DatasetJson(tmp_path)
