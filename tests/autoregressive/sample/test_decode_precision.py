"""--decode-precision: close to float32's images but other ones, in a set of their own; its default changes nothing."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from autoregressive.sample import edit_c2i, pipeline, sample_c2i, sample_c2i_ddp, sample_t2i, sample_t2i_ddp
from autoregressive.sample.image_set import sample_image_set, settings
from autoregressive.sample.pipeline import load_models, make_decoder, sample_codes
from autoregressive.sample.prompt_set import sample_prompt_set
from autoregressive.serve.cards import EMOJI, read_card
from evaluations.render import beside
from tests.autoregressive.sample.tiny import tiny_models, tiny_text_models
from tokenizer.coding import decode_codes
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.image import to_uint8

CPU = torch.device("cpu")
BF16 = ["--decode-precision", "bf16"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return [*map(str, tiny_models(tmp_path_factory.mktemp("tiny"))), "--engine", "eager"]


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory):
    return tiny_text_models(tmp_path_factory.mktemp("tiny_text"))


def call(command, *flags):
    command.main(command.parser().parse_args([str(flag) for flag in flags]))


def images_in(folder):
    """The PNGs of a folder: uint8 (B, H, W, 3)."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def assert_close_and_different(images, expected):
    error = images.astype(float) - expected
    assert images.shape == expected.shape and error.any()
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35


def test_images_of_the_emoji_model(tmp_path):
    flags = json.loads((EMOJI / "emoji-class.json").read_text())["flags"]
    files = {name: EMOJI / value for name, value in flags.items() if name in ("gpt-ckpt", "vq-ckpt", "class-names")}
    typed = [f"--{name}={value}" for name, value in {**flags, **files}.items()]
    typed += ["--class-labels", "heart", "cat-face", "--device", "cpu", "--engine", "eager"]
    call(sample_c2i, *typed, "--output-dir", tmp_path / "float32")
    call(sample_c2i, *typed, "--output-dir", tmp_path / "bf16", *BF16)
    call(sample_c2i, *typed, "--output-dir", tmp_path / "none", "--decode-precision", "none")
    expected = images_in(tmp_path / "float32")
    assert_close_and_different(images_in(tmp_path / "bf16"), expected)
    np.testing.assert_array_equal(images_in(tmp_path / "none"), expected)
    args = read_card(EMOJI / "emoji-class.json").args
    args.engine = "eager"
    gpt, tokenizer = load_models(args, CPU)
    labels = [json.loads((EMOJI / "classes.json").read_text()).index(name) for name in ("heart", "cat-face")]
    codes = sample_codes(gpt, torch.tensor(labels), args, [0, 1])
    np.testing.assert_array_equal(expected, to_uint8(decode_codes(tokenizer, codes)).numpy())


def test_texts_and_edits(tiny, tiny_text, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "input.png")
    edit = [*tiny, "--input", tmp_path / "input.png", "--class-labels", 2, 0, "--box", 8, 8, 16, 16]
    for command, flags in ((edit_c2i, edit), (sample_t2i, [*tiny_text, "--prompts", "a red cat", "the dog"])):
        folder = tmp_path / command.__name__
        call(command, *flags, "--output-dir", folder / "float32")
        call(command, *flags, "--output-dir", folder / "bf16", *BF16)
        assert_close_and_different(images_in(folder / "bf16"), images_in(folder / "float32"))


def sample_set(folder, *flags):
    parser = sample_c2i_ddp.parser()
    args = parser.parse_args([str(flag) for flag in (*flags, "--sample-dir", folder)])
    return sample_image_set(args, vars(parser.parse_args([])))


def test_a_set_knows_its_format_and_one_begun_without_a_choice_goes_on(tiny, tmp_path):
    begun = sample_set(tmp_path, *tiny, "--num-fid-samples", 2)
    noted = json.loads(beside(begun, ".json").read_text())
    assert "decode_precision" not in noted and noted["precision"] == "none"
    half = sample_set(tmp_path, *tiny, "--num-fid-samples", 3, *BF16)
    assert half.name == f"{begun.name}-decode-bf16"
    assert json.loads(beside(half, ".json").read_text()) == {**noted, "decode_precision": "bf16"}
    first = images_in(begun)
    assert sample_set(tmp_path, *tiny, "--num-fid-samples", 3, "--decode-precision", "none") == begun
    assert len(images_in(begun)) == 3 and (images_in(begun)[:2] == first).all()
    assert_close_and_different(images_in(half), images_in(begun))


def test_a_set_of_prompts_has_a_folder_of_its_own(tiny_text, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\nthe dog\n")
    parser, folders = sample_t2i_ddp.parser(), []
    for flags in ([], BF16):
        typed = [*tiny_text, "--prompt-csv", str(tmp_path / "prompts.txt"), "--sample-dir", str(tmp_path), *flags]
        folders.append(sample_prompt_set(parser.parse_args(typed), vars(parser.parse_args([]))))
    assert folders[1].name == f"{folders[0].name}-decode-bf16"
    assert_close_and_different(*(images_in(folder / "images") for folder in reversed(folders)))


def test_settings_of_the_default_are_those_of_before(tiny):
    args = sample_c2i_ddp.parser().parse_args(tiny)
    assert "decode_precision" not in settings(args) and args.decode_precision == "none"


@pytest.mark.parametrize(
    ("device", "precision", "package", "compiled"),
    [
        ("cuda", "bf16", True, True),
        ("cuda", "fp16", True, True),
        ("cuda", "bf16", False, False),
        ("cuda", "none", True, False),
        ("cpu", "bf16", True, False),
    ],
)
def test_half_precision_on_a_gpu_is_compiled_where_triton_is(device, precision, package, compiled, tiny, monkeypatch):
    monkeypatch.setattr(pipeline, "ImageDecoder", lambda *chosen: chosen)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" and package else None)
    args = sample_c2i_ddp.parser().parse_args([*tiny, "--decode-precision", precision])
    with FakeTensorMode(), torch.device(device):
        tokenizer = VQ_models["VQ-4-S"](codebook_size=64)
    assert make_decoder(args, tokenizer, batch_size=5) == (tokenizer, precision, compiled, 5)
