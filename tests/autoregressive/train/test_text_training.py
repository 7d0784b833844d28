"""Text-conditional training: images or codes, compact masks, invalid samples, the second stage."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import extract_codes_t2i, train_c2i_fsdp, train_t2i
from autoregressive.train.extraction import extract_captions
from autoregressive.train.inputs import TextInputs
from autoregressive.train.recipe import train
from dataset.t2i import prefix_mask
from tests.autoregressive.train.stores import POSITIONS, T2I, TOKENS, VOCABULARY, WIDTH, caption_codes
from tests.processes import in_processes
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import checkpoint
from utils.logger import read_metrics

VQ = ["--vq-model", "VQ-4-S", "--codebook-size", str(VOCABULARY)]
SMALL = [*T2I, "--global-batch-size", "4", "--log-every", "1", "--num-workers", "0", "--mixed-precision", "none",
         "--max-steps", "4", "--lr", "1e-3"]  # fmt: skip
NO_CHANCE = ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]


def training(command, *flags):
    train(command.parser().parse_args([*map(str, [*SMALL, *flags])]))


def losses(folder):
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """Two lists over six images of at least 16 pixels, features of them, and a tokenizer."""
    root, generator = tmp_path_factory.mktemp("lists"), np.random.default_rng(0)
    torch.manual_seed(0)
    torch.save({"model": VQ_models["VQ-4-S"](codebook_size=VOCABULARY).state_dict()}, root / "vq.pt")
    for stem, count in {"a": 4, "b": 2}.items():
        (root / "long" / stem).mkdir(parents=True)
        (root / "short" / stem).mkdir(parents=True)
        records = []
        for line in range(count):
            pixels = generator.integers(0, 255, (18, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{stem}{line}.png")
            records.append(json.dumps({"image_path": str(root / f"{stem}{line}.png"), "text": ["a thing"]}))
            for kind, tokens in {"long": line + 2, "short": 1}.items():
                features = generator.standard_normal((1, tokens, WIDTH)).astype(np.float32)
                np.save(root / kind / stem / f"{line}.npy", features)
        (root / "jsonl").mkdir(exist_ok=True)
        (root / "jsonl" / f"{stem}.jsonl").write_text("\n".join(records) + "\n")
    return root


def test_images_encoded_on_the_fly_train_as_their_extracted_codes(lists, tmp_path):
    flags = [*VQ, "--vq-ckpt", lists / "vq.pt", "--data-path", lists / "jsonl"]
    command = [*flags, "--code-path", tmp_path / "codes", "--image-size", "16", "--num-workers", "0"]
    extract_captions(extract_codes_t2i.parser().parse_args([*map(str, command)]))
    texts = ["--t5-feat-path", lists / "long", "--short-t5-feat-path", lists / "short"]
    training(train_t2i, *flags, *texts, "--run-dir", tmp_path / "images")
    training(train_t2i, *texts, "--dataset", "t2i_code", "--code-path", tmp_path / "codes", "--run-dir", tmp_path / "c")
    assert losses(tmp_path / "images") == losses(tmp_path / "c")
    assert losses(tmp_path / "c")[0] == pytest.approx(math.log(VOCABULARY), abs=1e-5)


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> tuple[Path, Path]:
    """Codes and features of nine captions, the last without features and so invalid."""
    return caption_codes(tmp_path_factory.mktemp("codes"), count=9)


def run(command, world, codes, folder, *flags):
    given = [
        "--dataset",
        "t2i_code",
        "--code-path",
        codes[0],
        "--t5-feat-path",
        codes[1],
        "--run-dir",
        folder,
        "--max-bad-share",
        0.2,
    ]
    in_processes(world, training, command, *given, *NO_CHANCE, *flags)
    return folder


@pytest.mark.parametrize(
    ("command", "flags"),
    [(train_t2i, ["--gradient-accumulation-steps", "2"]), (train_c2i_fsdp, ["--mixed-precision", "fp32"])],
    ids=["ddp", "fsdp"],
)
def test_invalid_samples_count_nothing_however_they_are_spread(command, flags, codes, tmp_path):
    one = run(train_t2i, 1, codes, tmp_path / "one", "--ema")
    two = run(command, 2, codes, tmp_path / "two", "--ema", *flags)
    assert losses(one) == pytest.approx(losses(two), abs=2e-5)
    first, second = (checkpoint.read(checkpoint.latest(folder / "checkpoints")) for folder in (one, two))
    torch.testing.assert_close(first["model"], second["model"], atol=3e-5, rtol=1e-4)


def inputs_of(codes, **changes) -> TextInputs:
    flags = ["--dataset", "t2i_code", "--code-path", codes[0], "--t5-feat-path", codes[1], "--max-bad-share", 0.2]
    args = train_t2i.parser().parse_args([*map(str, [*SMALL, *flags])])
    return TextInputs(argparse.Namespace(**{**vars(args), **changes}), torch.device("cpu"))


def test_compact_masks_become_the_established_ones(codes):
    inputs = inputs_of(codes)
    data = inputs.training_set()
    arguments = inputs([torch.stack(parts) for parts in zip(*(data[i] for i in range(8)))])
    assert data[0][2].shape == (POSITIONS,)  # five bytes, not 21 x 21
    for row in range(8):
        want = prefix_mask(POSITIONS + TOKENS, max(0, POSITIONS - (row + 1)))
        assert torch.equal(arguments["mask"][row], want[:, :-1, :-1])
    assert arguments["idx"].shape == (8, TOKENS - 1) and arguments["cond_idx"].shape == (8, POSITIONS, WIDTH)


def test_shares_follow_the_valid_samples(codes):
    batches = [(None, None, None, torch.tensor(valid)) for valid in ([1, 1, 1], [0, 1, 0])]
    assert inputs_of(codes).shares(batches) == [0.75, 0.25]
    nothing = [(None, None, None, torch.tensor([0, 0]))]
    assert inputs_of(codes).shares(nothing) == [0.0]


def test_the_second_stage_starts_from_the_weights_of_the_first(codes, tmp_path):
    run(train_t2i, 1, codes, tmp_path / "first")
    first = checkpoint.latest(tmp_path / "first/checkpoints")
    run(train_t2i, 1, codes, tmp_path / "second", "--init-from", first, "--max-steps", 2, "--lr", 0)
    second = checkpoint.read(tmp_path / "second/checkpoints/0000002.pt")
    torch.testing.assert_close(second["model"], checkpoint.read(first)["model"])
    assert second["steps"] == 2 and second["optimizer"]["state"][0]["step"] == 2
    with pytest.raises(AssertionError, match="give one of them"):
        run(train_t2i, 1, codes, tmp_path / "third", "--init-from", first, "--gpt-ckpt", first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t5_feat_path": None}, "--t5-feat-path is missing"),
        ({"code_path": None}, "--code-path is missing"),
        ({"dataset": "t2i"}, "--data-path is missing"),
        ({"dataset": "imagenet_code"}, "has no texts"),
    ],
)
def test_what_is_missing_is_said(changes, message, codes):
    with pytest.raises(ValueError, match=message):
        inputs_of(codes, **changes)


def test_a_tokenizer_that_does_not_fit_the_gpt_is_said(lists):
    flags = [*VQ, "--vq-ckpt", lists / "vq.pt", "--data-path", lists / "jsonl", "--t5-feat-path", lists / "long"]
    args = train_t2i.parser().parse_args([*map(str, [*SMALL, *flags, "--vocab-size", 128])])
    with pytest.raises(ValueError, match=r"16 codes of 64 .* 16 codes of 128"):
        TextInputs(args, torch.device("cpu"))
