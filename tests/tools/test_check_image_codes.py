"""Codes become the pictures that the tokenizer's decoder makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.codes import CodeFolder, write_array, write_codes
from dataset.packed import sha256_of
from dataset.packing import PackedWriter
from tokenizer.tokenizer_image.vq_model import VQ_models
from tools import check_image_codes
from utils import checkpoint
from utils.image import make_grid_image

SIZE = ["--vq-model", "VQ-4-S", "--codebook-size", "64", "--image-size", "16", "--downsample-size", "4"]


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """The tokenizer whose weights are in vq.pt, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = VQ_models["VQ-4-S"](codebook_size=64).eval()
    checkpoint.save({"model": model.state_dict()}, "vq.pt")
    return model


def check(code_path: object, *flags: object) -> np.ndarray:
    line = [*SIZE, "--vq-ckpt", "vq.pt", "--code-path", str(code_path), *map(str, flags)]
    check_image_codes.check(check_image_codes.parser().parse_args(line))
    return np.asarray(Image.open("sample_image_code.png"))


@torch.no_grad()
def grid(tokenizer, codes: np.ndarray, columns: int) -> np.ndarray:
    images = tokenizer.decode_code(torch.from_numpy(codes), (len(codes), 8, 4, 4))
    return np.asarray(make_grid_image(images, columns))


@pytest.mark.parametrize(("views", "columns"), [(1, 4), (2, 4), (10, 5), (12, 6)])
def test_all_views_of_a_file(tokenizer, views, columns):
    codes = np.random.default_rng(0).integers(0, 64, (views, 16))
    write_array("0.npy", codes[None])
    found, expected = check("0.npy").astype(int), grid(tokenizer, codes, columns).astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1  # another memory format
    if views == 10:
        assert check("0.npy").shape == (2 * 18 + 2, 5 * 18 + 2, 3)  # two rows of five, as established


def test_one_caption_file(tokenizer):
    codes = np.random.default_rng(0).integers(0, 64, (1, 16))
    write_array("0.npy", codes)
    assert np.array_equal(check("0.npy"), grid(tokenizer, codes, 4))


def store(kind: str, count: int, **settings: object) -> np.ndarray:
    codes = np.random.default_rng(1).integers(0, 64, (count, 1, 16))
    writer = PackedWriter(
        f"{kind}/imagenet16_packed", kind, images=count, views=1, tokens=16, codebook_size=64,
        settings={"image_size": 16, "stems": ["a"], **settings},
    )  # fmt: skip
    writer.claim()
    for number, rows in enumerate(writer.shards):
        lines = np.arange(rows.start, rows.stop)
        writer.write(number, codes[rows], lines if kind == "class" else np.stack([0 * lines, lines], 1))
    writer.finish()
    return codes[:, 0]


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_random_entries_of_a_store(tokenizer, kind):
    codes = store(kind, 20)
    shown = check(kind, "--num-images", 9, "--seed", 3)
    assert np.array_equal(shown, check(f"{kind}/imagenet16_packed", "--num-images", 9, "--seed", 3))
    assert not np.array_equal(shown, check(kind, "--num-images", 9, "--seed", 4))
    places = np.random.default_rng(3).permutation(20)[:9]
    assert np.array_equal(shown, grid(tokenizer, codes[places], 4))


def test_random_entries_of_files(tokenizer):
    codes = np.random.default_rng(0).integers(0, 64, (3, 16))
    for i in range(3):
        write_codes(CodeFolder.named("codes", "imagenet", 16), i, codes[i : i + 1], 0)
    places = np.random.default_rng(0).permutation(3)
    assert np.array_equal(check("codes"), grid(tokenizer, codes[places], 4))


def test_codes_of_another_tokenizer_are_refused(tokenizer):
    store("class", 3, tokenizer_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"made by another tokenizer than vq\.pt"):
        check("class")
    store("caption", 3, tokenizer_sha256=sha256_of("vq.pt"))
    check("caption")


def test_mistakes_are_named(tokenizer):
    write_array("big.npy", np.full((1, 1, 16), 64))
    with pytest.raises(ValueError, match="codes from 64 to 64, the codebook has 64"):
        check("big.npy")
    write_array("long.npy", np.zeros((1, 1, 17)))
    with pytest.raises(ValueError, match=r"17 codes an image; .* 4 x 4 = 16"):
        check("long.npy")
    write_array("flat.npy", np.zeros(16))
    with pytest.raises(ValueError, match=r"must have the shape .*, found \(16,\)"):
        check("flat.npy")
    with pytest.raises(ValueError, match=r"cannot read absent\.npy"):
        check("absent.npy")
    with pytest.raises(FileNotFoundError):
        check(Path.cwd())
    with pytest.raises(SystemExit):
        check_image_codes.parser().parse_args(["--code-path", "0.npy"])  # --vq-ckpt is required
