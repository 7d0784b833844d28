"""Code extraction in both layouts, for classes and captions: the same codes however it is batched, split or killed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import extract_codes_c2i, extract_codes_t2i, extraction
from autoregressive.train.extraction import encode_crops, extract, extract_captions
from dataset.augmentation import extraction_transform
from dataset.codes import CodeFolder
from dataset.imagenet import PackedDataset, build_imagenet_code
from dataset.images import ClassFolders
from dataset.packed import CaptionCodes, PackedCodes
from tests.commands.shell import EXTRACT, VQ_SIZE, make_images, run
from tests.commands.test_faults import start
from tokenizer.coding import ImageEncoder
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import checkpoint

T2I = "autoregressive/train/extract_codes_t2i.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with 15 images in three classes, two caption lists of them, and a tokenizer."""
    return make_data(tmp_path_factory.mktemp("extraction"), per_class=5)


def make_data(work: Path, per_class: int) -> Path:
    """Images, lists that name eight of them and the others, vq.pt."""
    images = make_images(work / "images", per_class)
    torch.manual_seed(0)
    checkpoint.save({"model": VQ_models["VQ-4-S"](codebook_size=64).state_dict()}, work / "vq.pt")
    (work / "lists").mkdir()
    paths = [str(path) for path in sorted(images.rglob("*.png"))]
    for name, own in {"part.0001.jsonl": paths[:8], "part.0002.jsonl": paths[8:]}.items():
        lines = [json.dumps({"image_path": path, "text": ["a square"]}) for path in own]
        (work / "lists" / name).write_text("\n\n".join(lines) + "\n")  # every second line is blank
    return work


def flags_of(work: Path, code_path: Path, *more: object, data: str = "images") -> list[str]:
    flags = [*VQ_SIZE, "--vq-ckpt", work / "vq.pt", "--data-path", work / data, "--code-path", code_path,
             "--num-workers", 0, "--device", "cpu", *more]  # fmt: skip
    return [str(flag) for flag in flags]


def c2i(work: Path, code_path: Path, *more: object, **where: str) -> Path:
    extract(extract_codes_c2i.parser().parse_args(flags_of(work, code_path, *more, **where)))
    return code_path


def t2i(work: Path, code_path: Path, *more: object) -> Path:
    extract_captions(extract_codes_t2i.parser().parse_args(flags_of(work, code_path, *more, data="lists")))
    return code_path


def all_codes(store: Path) -> np.ndarray:
    reader = PackedCodes(store)
    return np.concatenate([reader.read(row)[0] for row in reader.indices()])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def packed(work) -> Path:
    """The store of one uninterrupted extraction, shards of one image."""
    return c2i(work, work / "packed", "--batch-size", 1) / "imagenet16_packed"


def test_packed_codes_are_those_of_one_image_at_a_time(work, packed):
    images = ClassFolders(work / "images", extraction_transform(16))
    tokenizer = VQ_models["VQ-4-S"](codebook_size=64)
    tokenizer.load_state_dict(checkpoint.read(work / "vq.pt")["model"])
    tokenizer.eval()
    reader = PackedCodes(packed)
    assert len(reader.indices()) == 15 and reader.views == 2 and reader.tokens == 16
    for i, (crops, label) in enumerate(images):
        alone = torch.stack([encode_crops(tokenizer, crop[None, None])[0, 0] for crop in crops])
        codes, stored = reader.read(i)
        assert np.array_equal(codes[0], alone.numpy()) and stored.tolist() == [label]
    assert len(np.unique(all_codes(packed))) > 8  # the codes do differ


@pytest.mark.parametrize("batch_size", [4, 64])
def test_batches_and_shards_do_not_change_codes(work, packed, tmp_path, batch_size):
    c2i(work, tmp_path, "--batch-size", batch_size, "--shard-size", 1)
    assert np.array_equal(all_codes(tmp_path / "imagenet16_packed"), all_codes(packed))


def test_both_layouts_hold_the_same(work, tmp_path):
    for layout in ("packed", "files"):
        c2i(work, tmp_path / layout, "--layout", layout, "--ten-crop")
    one, two = (
        build_imagenet_code(argparse.Namespace(code_path=tmp_path / n, image_size=16)) for n in ("packed", "files")
    )
    assert type(one) is PackedDataset and one.num_views == two.num_views == 10
    for i in range(15):
        assert all(np.array_equal(a, b) for a, b in zip(one.source.read(i), two.source.read(i)))
    first = np.load(tmp_path / "files/imagenet16_codes/0.npy")
    assert first.dtype == np.int64 and first.shape == (1, 10, 16)


def test_the_manifest_says_how_the_codes_were_made(work, packed):
    facts = PackedCodes(packed).manifest
    wanted = {
        "format": 1, "kind": "class", "images": 15, "dtype": "uint16", "views": 2, "tokens": 16, "grid": 4,
        "codebook_size": 64, "image_size": 16, "tokenizer": "VQ-4-S", "crops": "centre and mirror",
        "dataset": "imagenet", "classes": ["blue", "green", "red"], "missing": [],
    }  # fmt: skip
    assert {name: facts[name] for name in wanted} == wanted
    assert len(facts["tokenizer_sha256"]) == len(facts["source_sha256"]) == 64
    assert [(shard["first"], shard["count"]) for shard in facts["shards"]] == [(i, 1) for i in range(15)]


def test_only_missing_and_broken_shards_are_done_again(work, packed, tmp_path, monkeypatch):
    store = shutil.copytree(packed, tmp_path / "imagenet16_packed")
    for name in ("manifest.json", "codes-00003.json"):
        (store / name).unlink()
    broken = store / "codes-00007.npy"
    broken.write_bytes(broken.read_bytes()[:-2])
    seen = []
    real = ImageEncoder.of_views

    def spy(encode, crops):
        seen.append(len(crops))
        return real(encode, crops)

    monkeypatch.setattr(ImageEncoder, "of_views", spy)
    c2i(work, tmp_path)
    assert seen == [1, 1] and contents(store) == contents(packed)


def test_tf32_says_how_many_codes_are_exact_and_changes_none_on_a_cpu(work, packed, tmp_path, capsys):
    c2i(work, tmp_path, "--encode-precision", "tf32", "--batch-size", 1)
    assert capsys.readouterr().out.count("rank 0: 100.00% of the first 32 codes are the exact ones") == 1
    assert contents(tmp_path / "imagenet16_packed") == contents(packed)


def test_codes_of_tf32_are_counted_and_noted(work, tmp_path, capsys, monkeypatch):
    """A convolution of TF32 does not exist here, so the first code of each view is changed by hand."""
    real = ImageEncoder.__call__

    def rough(encode, images):
        codes = real(encode, images)
        codes[:, 0] ^= encode.precision == "tf32"  # another code, of an even codebook
        return codes

    monkeypatch.setattr(ImageEncoder, "__call__", rough)
    monkeypatch.setattr(extraction, "_tf32_there", lambda device: True)
    c2i(work, tmp_path, "--encode-precision", "tf32")
    assert "93.75% of the first 32 codes are the exact ones" in capsys.readouterr().out  # 15 of 16
    assert PackedCodes(tmp_path / "imagenet16_packed").manifest["encode_precision"] == "tf32"
    with pytest.raises(ValueError, match=r"another encode_precision \(tf32, now None\)"):
        c2i(work, tmp_path)


def test_unreadable_images_are_listed_in_the_manifest(work, packed, tmp_path, capsys):
    images = shutil.copytree(work / "images", tmp_path / "images")
    (images / "green" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 of 15 items cannot be read"):
        c2i(tmp_path, tmp_path / "codes", "--vq-ckpt", work / "vq.pt")
    c2i(tmp_path, tmp_path / "codes", "--vq-ckpt", work / "vq.pt", "--max-bad-share", 0.1)
    assert "1 images could not be read and have no codes: [6]" in capsys.readouterr().err
    store = tmp_path / "codes/imagenet16_packed"
    assert PackedCodes(store).manifest["missing"] == [6]
    assert np.array_equal(all_codes(store), np.delete(all_codes(packed), 6, axis=0))


def test_codes_of_other_settings_or_images_are_never_mixed(work, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "imagenet16_packed")
    other = checkpoint.read(work / "vq.pt")
    other["model"]["quantize.embedding.weight"] += 0.1
    checkpoint.save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="another tokenizer_sha256"):
        c2i(work, tmp_path, "--vq-ckpt", tmp_path / "other.pt")
    with pytest.raises(ValueError, match="another views"):
        c2i(work, tmp_path, "--ten-crop")
    images = shutil.copytree(work / "images", tmp_path / "images")
    c2i(work, tmp_path, "--data-path", images)  # the same images in another place
    Image.new("RGB", (50, 50)).save(images / "red" / "0.png")
    with pytest.raises(ValueError, match="another source_sha256"):
        c2i(work, tmp_path, "--data-path", images)


def test_captions_have_an_index_of_list_and_line(work, packed, tmp_path):
    codes = CaptionCodes(t2i(work, tmp_path / "packed"))
    stems = ["part.0001"] * 8 + ["part.0002"] * 7
    assert codes.keys == list(zip(stems, [*range(0, 16, 2), *range(0, 14, 2)]))
    centre = all_codes(packed)[:, 0]
    assert all(np.array_equal(codes.read(*key)[0], wanted) for key, wanted in zip(codes.keys, centre))
    t2i(work, tmp_path / "files", "--layout", "files")
    for stem, line in codes.keys:
        file = np.load(tmp_path / f"files/{stem}/{line}.npy")
        assert file.dtype == np.int64 and file.shape == (1, 16) and np.array_equal(file, codes.read(stem, line))


def test_ten_crops_of_captioned_images_are_those_of_the_class_command(work, tmp_path):
    crops = ["--ten-crop", "--crop-range", 1.25]
    codes = CaptionCodes(t2i(work, tmp_path / "captions", *crops))
    classes = all_codes(c2i(work, tmp_path / "classes", *crops) / "imagenet16_packed")
    assert codes.views == 10 and not np.array_equal(classes[:, 0], classes[:, 9])
    for view in (0, 9):
        found = np.concatenate([codes.read(*key, view=view) for key in codes.keys])
        assert np.array_equal(found, classes[:, view])
    with pytest.raises(ValueError, match="needs --layout packed"):
        t2i(work, tmp_path / "files", "--layout", "files", *crops)


def test_pieces_of_the_lists_share_a_folder(work, tmp_path):
    t2i(work, tmp_path, "--data-start", 0, "--data-end", 0)
    assert CaptionCodes(tmp_path).stems == ["part.0001"]
    t2i(work, tmp_path, "--data-start", 1, "--data-end", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t2i16_00000-00000_packed", "t2i16_00001-00001_packed"]
    assert len(CaptionCodes(tmp_path)) == 15


def test_established_flags_of_the_captions_command(work):
    line = ("--data-path d --code-path c --data-start 0 --data-end 9 --vq-model VQ-8 --vq-ckpt x --codebook-size 16384 "
            "--codebook-embed-dim 8 --image-size 448 --global-seed 0 --num-workers 24")  # fmt: skip
    assert extract_codes_t2i.parser().parse_args(line.split()).data_end == 9
    defaults = extract_codes_t2i.parser().parse_args(["--data-path", "d", "--code-path", "c", "--vq-ckpt", "x"])
    assert (defaults.image_size, defaults.vq_model, defaults.layout) == (512, "VQ-16", "packed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "data", "store"), [(EXTRACT, "images", "imagenet16_packed"), (T2I, "lists", "t2i16_packed")]
)
def test_two_processes_killed_and_one_resumed_equal_one_uninterrupted(script, data, store, tmp_path):
    work, killed = make_data(tmp_path, per_class=30), tmp_path / "killed" / store
    flags = flags_of(work, tmp_path / "killed", "--batch-size", 1, "--shard-size", 1, data=data)
    process = start(script, *flags, processes=2)
    wait_until(shards_are_there(killed, 3), process)
    for pid in [process.pid, *descendants(process.pid)]:  # torchrun's workers have sessions of their own
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = {path: path.stat().st_mtime_ns for path in killed.glob("codes-*.json")}
    assert 3 <= len(done) < 90 and not (killed / "manifest.json").exists()
    run(script, *flags)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    (c2i if script == EXTRACT else t2i)(work, tmp_path / "whole", "--shard-size", 1)
    left = {name: data for name, data in contents(killed).items() if not name.endswith(".tmp")}
    assert left == contents(tmp_path / "whole" / store) and len(left) == 3 * 90 + 2


def wait_until(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline, "the command did not get going"
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [one for child in map(int, found) for one in (child, *descendants(child))]


def shards_are_there(store: Path, count: int) -> Callable[[], bool]:
    return lambda: len(list(store.glob("codes-*.json"))) >= count


@pytest.mark.slow
def test_two_processes_write_what_one_writes(work, packed, tmp_path):
    run(EXTRACT, *flags_of(work, tmp_path, "--batch-size", 3), processes=2)
    assert contents(tmp_path / "imagenet16_packed") == contents(packed)


def test_files_of_the_established_layout_go_on_where_they_stopped(work, tmp_path):
    c2i(work, tmp_path, "--layout", "files")
    folder = CodeFolder.named(tmp_path, "imagenet", 16)
    before = {i: (folder.codes / f"{i}.npy").stat().st_mtime_ns for i in range(15)}
    (folder.codes / "4.npy").unlink()
    c2i(work, tmp_path, "--layout", "files")
    assert [i for i in range(15) if (folder.codes / f"{i}.npy").stat().st_mtime_ns != before[i]] == [4]
