"""The text-to-image evaluation as a whole, on a tiny CLIP and Inception weights of a fixture."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.clean_inception import CleanInception
from evaluations.clip_score import Clip
from evaluations.inception import Inception
from evaluations.metrics import frechet_distance_of_features
from evaluations.t2i import evaluation
from evaluations.t2i.pictures import SquarePictures, generated_pictures, reference_pictures
from evaluations.t2i.scores import evaluate
from tests.commands import shell
from tests.evaluations.tiny_clip import tiny_clip
from tests.golden import FOLDER

COMMAND = "evaluations/t2i/evaluation.py"
GRAPH = FOLDER / "evaluator" / "inception_2048.pb"
COUNT = 7


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def save_noise(path, seed, size):
    """Coarse noise, so that pictures differ after resizing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size).save(path)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    for i in range(9):
        save_noise(folder / "val2014" / f"{i}.png", 100 + i, (40 + i, 30))
    return folder


@pytest.fixture
def fake(tmp_path):
    """Seven listed pictures, and two fillers of the last batch."""
    for i in range(COUNT + 2):
        save_noise(tmp_path / "fake/images" / f"{i:06d}.png", i, (32, 32))
    entries = [{"text": f"caption {i}", "image_path": f"images/{i:06d}.png"} for i in range(COUNT)]
    (tmp_path / "fake/result.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path / "fake"


def run(fake, *flags):
    base = ["--fake_dir", fake, "--eval_res", "24", "--num-workers", "0", "--device", "cpu", "--batch_size", "3"]
    return evaluate(evaluation.parser().parse_args([str(flag) for flag in (*base, *flags)]))


def test_scores_are_those_of_the_listed_pictures(fake, coco, clip, capsys):
    got = run(fake, "--ref_dir", coco, "--clip-weights", clip, "--weights", GRAPH)
    assert list(got) == ["CLIP score", "FD-Inception_24px"]  # unknown weights: never FID

    pairs = generated_pictures(fake, COUNT)
    pictures = torch.stack(list(SquarePictures([pair.path for pair in pairs], 24)))
    cosines = Clip(clip).cosines(pictures, [pair.caption for pair in pairs])
    assert got["CLIP score"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    network = CleanInception(Inception(GRAPH))
    real = torch.stack(list(SquarePictures(reference_pictures(coco, "coco2014", "train"), 24)))
    want = frechet_distance_of_features(network(real)["pool"], network(pictures)["pool"])
    assert got["FD-Inception_24px"] == pytest.approx(want, rel=1e-4)

    lines = (fake / "score.txt").read_text().splitlines()
    assert lines == [f"{name}: {value}" for name, value in got.items()]
    printed = capsys.readouterr().out
    assert all(line in printed for line in lines) and "FID" not in printed
    record = json.loads((fake / "scores.json").read_text())
    assert record["scores"] == got and record["generated"] == COUNT and record["pairs"] == COUNT
    assert "unknown weights" in record["features"]


def test_fillers_change_nothing(fake, coco):
    flags = ("--ref_dir", coco, "--clip_model4eval", "WO", "--weights", GRAPH)
    with_fillers = run(fake, *flags)
    for i in (COUNT, COUNT + 1):
        (fake / f"images/{i:06d}.png").unlink()
    assert run(fake, *flags) == with_fillers


def test_how_many_bounds_the_clip_score_alone(fake, coco, clip):
    few, all_of_them = (
        run(fake, "--ref_dir", coco, "--clip-weights", clip, "--weights", GRAPH, "--how_many", n) for n in (2, 100)
    )
    assert few["CLIP score"] != all_of_them["CLIP score"]
    assert few["FD-Inception_24px"] == all_of_them["FD-Inception_24px"]


def test_other_references_than_coco(fake, coco, tmp_path):
    """The established command demanded classes among the generated pictures here, and then crashed."""
    shutil.copytree(coco / "val2014", tmp_path / "imagenet/valid/n01")
    flags = ("--clip_model4eval", "WO", "--weights", GRAPH)
    other = run(fake, "--ref_dir", tmp_path / "imagenet", "--ref_data", "imagenet2012", "--ref_type", "valid", *flags)
    assert other == run(fake, "--ref_dir", coco, *flags)


def test_without_references_the_clip_score_alone(fake, clip):
    assert list(run(fake, "--clip-weights", clip)) == ["CLIP score"]


def test_lite0_is_named_as_what_it_is(fake, coco):
    got = run(fake, "--ref_dir", coco, "--clip_model4eval", "WO", "--features", "lite0")
    assert list(got) == ["FD-lite0_24px"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--clip_model4eval", "WO"], "nothing to measure"),
        (["--how_many", "0"], "--how_many must be at least 1"),
        (["--eval_res", "-3"], "--eval_res must be at least 1"),
    ],
)
def test_wrong_flags(fake, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(fake, *flags)


def test_unknown_flags_are_named_and_ignored(fake, clip, monkeypatch, capsys):
    flags = ["--fake_dir", fake, "--clip-weights", clip, "--device", "cpu", "--eval_res", "24", "--old-flag", "3"]
    monkeypatch.setattr(sys, "argv", [COMMAND, *map(str, flags)])
    evaluation.main()
    captured = capsys.readouterr()
    assert "ignored unknown flags: --old-flag 3" in captured.err and "CLIP score" in captured.out


@pytest.mark.slow
def test_two_processes_give_what_one_gives(fake, coco, clip):
    flags = ("--ref_dir", coco, "--clip-weights", clip, "--weights", GRAPH)
    alone = run(fake, *flags)
    shell.run(COMMAND, "--fake_dir", fake, "--eval_res", 24, "--device", "cpu", *flags, processes=2)
    together = json.loads((fake / "scores.json").read_text())["scores"]
    assert together == pytest.approx(alone, rel=1e-5)
