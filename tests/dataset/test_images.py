"""Reading images, class folders, and the two ways to treat unreadable images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from dataset.augmentation import eval_transform
from dataset.images import (
    BadItems,
    ClassFolders,
    NumberedImages,
    SkipBad,
    TooSmall,
    UnreadableImage,
    collate_numbered,
    read_rgb,
)


def grey(image: torch.Tensor | Image.Image) -> int:
    """The grey value of a one-coloured image."""
    value = image.getpixel((0, 0))[0] if isinstance(image, Image.Image) else (float(image[0, 0, 0]) + 1) * 127.5
    return round(value)


def truncate(path: Path, kept: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16", "CMYK", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (5, 7)).save(path)
    image = read_rgb(path)
    assert image.mode == "RGB" and image.size == (5, 7)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an image at all"),
        lambda path: truncate(path, 0.6),
        lambda path: path.write_bytes(path.read_bytes()[:40] + bytes(60)),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["empty", "text", "truncated", "zeroed", "missing", "folder"],
)
def test_unreadable_files_give_one_clear_error(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "broken.png"
    Image.effect_noise((64, 64), 50).save(path)
    damage(path)
    with pytest.raises(UnreadableImage, match=r"broken.png"):
        read_rgb(path)


def test_a_decompression_bomb_is_refused(huge_png: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"huge.png.*DecompressionBomb"):
        read_rgb(huge_png)


def test_small_images_are_found_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    Image.effect_noise((64, 31), 50).save(path)
    truncate(path)  # decoding would fail
    with pytest.raises(TooSmall, match="64x31"):
        read_rgb(path, at_least=32)


def test_class_folders_number_like_image_folder(class_folders: Path) -> None:
    (class_folders / "b" / "deeper").mkdir()
    Image.new("RGB", (8, 8)).save(class_folders / "b" / "deeper" / "z.JPEG")
    (class_folders / "a" / "notes.txt").write_text("no image")
    (class_folders / "a" / ".hidden.png").write_bytes(b"left by a file manager")
    ours = ClassFolders(class_folders)
    (class_folders / "a" / ".hidden.png").unlink()
    assert ours.samples == ImageFolder(str(class_folders)).samples
    assert [label for _, label in ours.samples] == [0, 0, 1, 1, 1, 2, 2]
    image, label = ours[2]
    assert (grey(image), label) == (20, 1)


def test_a_split_without_some_classes_keeps_the_numbers(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    save_image(tmp_path / "val" / "c" / "0.png")
    assert ClassFolders(tmp_path / "val")[0][1] == 0
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    reader = ClassFolders(tmp_path / "val")
    assert reader[0][1] == 2 and reader.classes == ["a", "b", "c"]


def test_a_class_outside_the_list_is_refused(class_folders: Path) -> None:
    (class_folders / "classes.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(ValueError, match=r"'c', which classes.json does not list"):
        ClassFolders(class_folders)


def test_missing_and_empty_folders(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        ClassFolders(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no sub-folders"):
        ClassFolders(tmp_path)
    save_image(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="no sub-folders"):
        ClassFolders(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no images in the class folders"):
        ClassFolders(tmp_path)


def test_training_takes_the_next_readable_image(class_folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (2, 3, 5):
        truncate(class_folders / "abc"[number // 2] / f"{number}.png", 0.3)
    dataset = SkipBad(ClassFolders(class_folders), max_share=0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [(grey(image), label) for image, label in dataset] == [
                (0, 0), (10, 0), (40, 2), (40, 2), (40, 2), (0, 0),
            ]  # fmt: skip
    assert len(dataset) == 6
    assert dataset.bad.indices() == [2, 3, 5]
    assert len(caplog.records) == 3  # once for each


def test_too_many_bad_images_stop_the_run(class_folders: Path) -> None:
    truncate(class_folders / "a" / "0.png", 0.3)
    with pytest.raises(ValueError, match=r"1 of 6 items cannot be read, more than 1.0%.*0\.png"):
        SkipBad(ClassFolders(class_folders))[0]


def test_no_readable_image_at_all_is_an_error(class_folders: Path) -> None:
    for path in class_folders.rglob("*.png"):
        truncate(path, 0.3)
    with pytest.raises(ValueError, match="none of the 6 images"):
        SkipBad(ClassFolders(class_folders), max_share=1.0)[0]


def test_a_bug_in_a_transform_is_not_a_bad_image(class_folders: Path) -> None:
    def broken(image: Image.Image) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        SkipBad(ClassFolders(class_folders, broken), max_share=1.0)[0]


def test_extraction_keeps_the_numbers(class_folders: Path) -> None:
    truncate(class_folders / "b" / "2.png", 0.3)
    dataset = NumberedImages(ClassFolders(class_folders, eval_transform(8)), max_share=0.2)
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate_numbered)
    seen = {int(i): (grey(x), int(y)) for batch in loader for i, x, y in zip(*batch)}
    assert seen == {0: (0, 0), 1: (10, 0), 3: (30, 1), 4: (40, 2), 5: (50, 2)}
    assert dataset.bad.indices() == [2]


def test_a_batch_without_readable_images_is_none() -> None:
    assert collate_numbered([None, None]) is None


def test_workers_count_bad_images_together(class_folders: Path) -> None:
    for number in (0, 3):
        truncate(class_folders / "abc"[number // 2] / f"{number}.png", 0.3)
    dataset = SkipBad(ClassFolders(class_folders, eval_transform(8)), max_share=0.4)
    loader = DataLoader(dataset, batch_size=1, num_workers=2)
    assert [grey(image[0]) for image, _ in loader] == [10, 10, 20, 40, 40, 50]
    assert dataset.bad.indices() == [0, 3]  # each was found by another worker

    strict = SkipBad(ClassFolders(class_folders, eval_transform(8)), max_share=0.2)
    with pytest.raises(ValueError, match="2 of 6 items"):  # each worker met only one
        list(DataLoader(strict, batch_size=1, num_workers=2, sampler=[0, 3, 1, 2]))


def test_share_out_of_range() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        BadItems(10, 1.5)
