"""A training that draws: which files appear, that they do not depend on anything but weights and seed."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import pictures
from autoregressive.train.inputs import make_inputs
from autoregressive.train.pictures import SamplePictures, some_captions, some_items, spread_labels
from autoregressive.train.recipe import train
from autoregressive.train.train_c2i import parser
from autoregressive.train.train_t2i import parser as text_parser
from tests.autoregressive.models.tiny import random_model
from tests.autoregressive.train.stores import C2I, CLASSES, T2I, TOKENS, VOCABULARY, caption_codes, class_codes
from tests.commands.shell import run
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import checkpoint
from utils.logger import read_metrics

CPU = torch.device("cpu")
SHORT = ["--global-batch-size", "4", "--num-workers", "0", "--mixed-precision", "none", "--max-steps", "3",
         "--log-every", "1", "--val-every", "2", "--ema", "--ema-decay", "0.5", "--lr", "0.01",
         "--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The checkpoint of an untrained tokenizer with 64 codes, and the flags for it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vq") / "vq.pt"
    checkpoint.save({"model": VQ_models["VQ-4-S"](codebook_size=VOCABULARY).state_dict()}, path)
    return ["--vq-model", "VQ-4-S", "--codebook-size", str(VOCABULARY), "--vq-ckpt", str(path)]


def drawing(model, **changes):
    torch.manual_seed(1)
    settings = {"precision": "none", "seed": 0, "cfg_scale": 2.0, "everywhere": False, **changes}
    vq = VQ_models["VQ-4-S"](codebook_size=VOCABULARY).eval()
    return SamplePictures({"samples": model}, vq, spread_labels(CLASSES, 6, CPU), None, **settings)


def test_the_same_weights_draw_the_same_pictures_and_training_is_left_alone():
    model = random_model(vocab_size=VOCABULARY, block_size=TOKENS, num_classes=CLASSES).train()
    first = drawing(model)()["samples"]
    torch.rand(100)  # the state of the global generator does not matter
    assert first.shape == (6, 3, 16, 16) and torch.equal(first, drawing(model)()["samples"]) and model.training
    assert not torch.equal(first, drawing(model, seed=1)()["samples"])
    state = torch.get_rng_state()
    drawing_again = drawing(model)
    torch.set_rng_state(state)
    drawing_again()
    assert torch.equal(state, torch.get_rng_state())


def test_labels_are_spread_over_all_classes():
    assert spread_labels(1000, 4, CPU).tolist() == [0, 333, 666, 999]
    assert spread_labels(2, 4, CPU).tolist() == [0, 0, 1, 1]


def test_other_processes_draw_only_when_weights_are_sharded(monkeypatch):
    monkeypatch.setattr(pictures, "is_main", lambda: False)
    model = random_model(vocab_size=VOCABULARY, block_size=TOKENS, num_classes=CLASSES)
    assert drawing(model)() == {} and list(drawing(model, everywhere=True)()) == ["samples"]


def test_captions_come_with_their_masks(tmp_path):
    code_path, features = caption_codes(tmp_path, count=101)
    args = text_parser().parse_args([*T2I, "--dataset", "t2i_code", "--code-path", str(code_path),
                                     "--t5-feat-path", str(features)])  # fmt: skip
    inputs = make_inputs(args, CPU)
    conditions, text = some_captions(inputs, inputs.codes(args.code_path), 3)
    assert conditions.shape == (3, 5, 6) and text.sum(1).tolist() == [1, 5, 5]  # the last has no features
    assert not conditions[0, :4].any() and conditions[0, 4].any()
    assert len(some_items(range(5), 9)) == 5


def test_a_run_shows_its_data_and_what_it_draws(tokenizer, tmp_path):
    flags = [*C2I, *SHORT, *tokenizer, "--code-path", str(class_codes(tmp_path / "train"))]
    flags += ["--val-code-path", str(class_codes(tmp_path / "val", seed=1)), "--sample-images", "3"]
    train(parser().parse_args([*flags, "--run-dir", str(tmp_path / "run")]))
    shown = {path.name: Image.open(path) for path in (tmp_path / "run/pictures").iterdir()}
    drawn = [f"{step:07d}-{name}.png" for step in (2, 3) for name in ("samples", "samples-ema")]
    assert shown.keys() == {*drawn, "data.png"}
    assert shown["data.png"].size == (7 * 18 + 2, 20) and shown["0000002-samples.png"].size == (3 * 18 + 2, 20)
    assert len({np.asarray(image).tobytes() for image in shown.values()}) == 5
    log = (tmp_path / "run/log.txt").read_text()
    assert "Held-out data: 0 of 7" in log and "Train Loss: 4.1589, " in log  # ln 64


def test_captions_are_drawn_too(tokenizer, tmp_path):
    code_path, features = caption_codes(tmp_path, count=101)
    flags = [*T2I, *SHORT, *tokenizer, "--dataset", "t2i_code", "--code-path", str(code_path), "--t5-feat-path"]
    train(text_parser().parse_args([*flags, str(features), "--run-dir", str(tmp_path / "run")]))
    assert Image.open(tmp_path / "run/pictures/0000003-samples.png").size == (8 * 18 + 2, 2 * 18 + 2)


def test_a_tokenizer_with_other_codes_is_refused(tokenizer, tmp_path):
    flags = [*C2I, *SHORT, *tokenizer, "--vocab-size", "65", "--code-path", str(class_codes(tmp_path / "train"))]
    with pytest.raises(ValueError, match="has 64 codes, --vocab-size is 65"):
        train(parser().parse_args([*flags, "--run-dir", str(tmp_path / "run")]))


@pytest.mark.slow
def test_sharded_weights_validate_and_draw_like_whole_ones(tokenizer, tmp_path):
    """Also at the second validation: FSDP2 must not show the averaged weights of the first one again."""
    flags = [*C2I, *SHORT, *tokenizer, "--code-path", str(class_codes(tmp_path / "train"))]
    flags += ["--val-code-path", str(class_codes(tmp_path / "val", seed=1)), "--sample-images", "2"]
    train(parser().parse_args([*flags, "--run-dir", str(tmp_path / "whole")]))
    run("autoregressive/train/train_c2i_fsdp.py", *flags, "--no-wandb", "--run-dir", tmp_path / "sharded", processes=2)
    whole, sharded = (
        [entry for entry in read_metrics(tmp_path / name / "metrics.jsonl") if "val/loss" in entry]
        for name in ("whole", "sharded")
    )
    assert [entry["step"] for entry in sharded] == [2, 3] and whole[0]["val/ema_loss"] != whole[1]["val/ema_loss"]
    for one, two in zip(whole, sharded):
        for name in ("val/loss", "val/ema_loss", "val/bits_per_token"):
            assert one[name] == pytest.approx(two[name], abs=2e-5)
    assert (tmp_path / "sharded/pictures/0000003-samples-ema.png").is_file()
