"""A training that measures what it draws: fixed seeds, proper names, the same on any number of processes."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import sample_monitor
from autoregressive.train.recipe import train
from autoregressive.train.sample_monitor import equal_shares, together
from autoregressive.train.train_c2i import parser
from tests.autoregressive.train.stores import C2I, CLASSES, VOCABULARY, class_codes
from tests.commands.shell import TRAIN, run
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import checkpoint
from utils.logger import read_metrics

SHORT = ["--global-batch-size", "4", "--num-workers", "0", "--mixed-precision", "none", "--max-steps", "2",
         "--log-every", "1", "--val-every", "1", "--dropout-p", "0", "--token-dropout-p", "0",
         "--class-dropout-prob", "0", "--sample-images", "0", "--device", "cpu"]  # fmt: skip


class Colours:
    """Mean colours; stands in for a network of 18 MB."""

    label, comparable = "colours", False

    def __call__(self, pictures):
        return {"pool": pictures.float().unflatten(1, (2, -1)).mean(dim=(2, 3)).flatten(1)}


@pytest.fixture
def work(tmp_path):
    """Codes, a tokenizer, and ten pictures of noise."""
    torch.manual_seed(0)
    checkpoint.save({"model": VQ_models["VQ-4-S"](codebook_size=VOCABULARY).state_dict()}, tmp_path / "vq.pt")
    generator = np.random.default_rng(0)
    (tmp_path / "real").mkdir()
    for i in range(10):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / f"{i}.png")
    return tmp_path


def flags(work, *more):
    codes = class_codes(work)
    vq = ["--vq-model", "VQ-4-S", "--codebook-size", VOCABULARY, "--vq-ckpt", work / "vq.pt"]
    fixed = ["--code-path", codes, *vq, "--eval-reference", work / "real", "--eval-samples", 6]
    return [str(word) for word in (*C2I, *SHORT, *fixed, *more)]


def values(folder, name):
    return [entry[f"val/{name}"] for entry in read_metrics(folder / "metrics.jsonl") if f"val/{name}" in entry]


def test_validations_report_distances_of_the_same_draws(work, monkeypatch):
    monkeypatch.setattr(sample_monitor, "feature_network", lambda *_: Colours())
    train(parser().parse_args(flags(work, "--lr", "0", "--weight-decay", "0", "--run-dir", work / "still")))
    still = values(work / "still", "FD-colours")
    assert len(still) == 2 and still[0] == still[1] > 0  # nothing was learned: the same pictures
    train(parser().parse_args(flags(work, "--lr", "0.05", "--run-dir", work / "moved")))
    moved = values(work / "moved", "FD-colours")
    assert len({*moved, *still}) == 3 and len(values(work / "moved", "KD-colours")) == 2


def test_an_fid_says_of_how_many_pictures_it_is(work, monkeypatch):
    monkeypatch.setattr(Colours, "comparable", True)
    monkeypatch.setattr(sample_monitor, "feature_network", lambda *_: Colours())
    train(parser().parse_args(flags(work, "--ema", "--run-dir", work / "run")))
    assert len(values(work / "run", "ema_FID-6")) == 2 and len(values(work / "run", "ema_KID")) == 2
    assert values(work / "run", "FID") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--vq-ckpt", ""], "needs --vq-ckpt"),
        (["--eval-reference", ""], r"needs --eval-reference.*val_ddp\.py"),
        (["--eval-reference", "nowhere"], "there is no file nowhere"),
    ],
)
def test_what_is_missing_is_said(work, monkeypatch, change, sentence):
    monkeypatch.setattr(sample_monitor, "feature_network", lambda *_: Colours())
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        train(parser().parse_args(flags(work, *change, "--run-dir", work / "run")))


def test_without_a_network_it_does_not_start(work, monkeypatch):
    monkeypatch.setattr(sample_monitor, "feature_network", lambda *_: None)
    with pytest.raises(ValueError, match="needs a feature network"):
        train(parser().parse_args(flags(work, "--run-dir", work / "run")))


def test_all_processes_draw_equally_many(monkeypatch):
    monkeypatch.setattr(sample_monitor, "get_world_size", lambda: 4)
    assert [equal_shares(count) for count in (1, 4, 5, 8)] == [4, 4, 8, 8]


def test_together():
    assert together(None, lambda: {"a": 1})() == {"a": 1}
    assert together(lambda: {"b": 2}, lambda: {"a": 1})() == {"b": 2, "a": 1}


@pytest.mark.slow
def test_two_processes_report_what_one_reports(work):
    line = flags(work, "--lr", "0.01", "--eval-features", "lite0", "--num-classes", CLASSES)
    train(parser().parse_args([*line, "--run-dir", str(work / "one")]))
    run(TRAIN, *line, "--run-dir", work / "two", processes=2)
    one, two = (values(work / name, "FD-lite0") for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3) and len(one) == 2
