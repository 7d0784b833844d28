"""Sweeps: which sets are drawn, what is measured, and what a restart keeps."""

import json

import numpy as np
import pytest
import torch

from autoregressive.sample import sample_c2i_ddp, sweep_c2i
from autoregressive.sample import sweep as sweep_module
from autoregressive.sample.sweep import arguments_of, rows_of_grid, rows_of_table, sweep
from tests.autoregressive.sample.tiny import tiny_models
from utils.results_table import read_table


class MeanColours:
    """A network that sees the mean of each quarter of a picture."""

    label, comparable = "colours of quarters", False

    def __call__(self, pictures):
        halves = pictures.float().unflatten(2, (2, -1)).unflatten(1, (2, -1))
        return {"pool": halves.mean(dim=(2, 4)).flatten(1)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return [str(flag) for flag in tiny_models(tmp_path_factory.mktemp("tiny"))]


@pytest.fixture
def run(tiny, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=pictures)
    common = [*tiny, "--num-fid-samples", "8", "--sample-dir", str(tmp_path / "samples")]
    parser = sample_c2i_ddp.parser()

    def start(rows):
        args = sample_c2i_ddp.parser().parse_args([])
        args.reference, args.results = tmp_path / "real.npz", tmp_path / "sweep.csv"
        parse = lambda row: parser.parse_args([*common, *arguments_of(row)])  # noqa: E731
        sweep(args, rows, parse, vars(parser.parse_args([])), MeanColours())

    return start


def test_rows_of_a_grid_are_all_combinations():
    assert rows_of_grid(["cfg-scale=1,2.0", "--top-k=0"]) == [
        {"cfg-scale": "1", "top-k": "0"},
        {"cfg-scale": "2.0", "top-k": "0"},
    ]
    assert len(rows_of_grid(["a=1,2", "b=1,2,3", "c=1,2"])) == 12
    for word in ("cfg-scale", "cfg-scale=", "=1", "cfg-scale=1,,2"):
        with pytest.raises(ValueError, match="FLAG=VALUE,VALUE"):
            rows_of_grid([word])


def test_rows_of_a_table(tmp_path):
    (tmp_path / "t.csv").write_text("cfg-scale,cfg-schedule,balanced-labels\n1.5,linear,true\n2,,false\n")
    rows = rows_of_table(tmp_path / "t.csv")
    assert [arguments_of(row) for row in rows] == [
        ["--cfg-scale=1.5", "--cfg-schedule=linear", "--balanced-labels"],
        ["--cfg-scale=2"],
    ]
    (tmp_path / "t.json").write_text(json.dumps([{"cfg-scale": 1.5, "top-k": None, "use-ema": True}]))
    assert arguments_of(rows_of_table(tmp_path / "t.json")[0]) == ["--cfg-scale=1.5", "--use-ema"]
    for name, content in [("a.json", "{}"), ("b.csv", "cfg-scale\n"), ("c.json", "[]")]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            rows_of_table(tmp_path / name)


def test_a_sweep_measures_each_set_and_a_restart_draws_only_what_is_missing(run, tmp_path, monkeypatch):
    drawn, real = [], sweep_module.sample_image_set
    monkeypatch.setattr(sweep_module, "sample_image_set", lambda args, d: drawn.append(args.cfg_scale) or real(args, d))
    run(rows_of_grid(["cfg-scale=1.0,3.0"]))
    assert drawn == [1.0, 3.0]
    columns, rows = read_table(tmp_path / "sweep.csv")
    assert [row["cfg-scale"] for row in rows] == ["1.0", "3.0"] and "KD-colours" in columns
    assert rows[0]["KD-colours"] != rows[1]["KD-colours"] and rows[0]["images"] == "8"
    assert (tmp_path / "sweep.png").is_file()
    assert (tmp_path / "sweep.md").read_text().startswith("| cfg-scale | KD-colours |")

    run(rows_of_grid(["cfg-scale=1.0,2.0,3.0"]))
    assert drawn == [1.0, 3.0, 2.0]
    assert len(read_table(tmp_path / "sweep.csv")[1]) == 3


def test_the_metric_is_that_of_the_pictures(run, tmp_path):
    run(rows_of_grid(["cfg-scale=2.0"]))
    row = read_table(tmp_path / "sweep.csv")[1][0]
    folder = tmp_path / "samples" / f"{row['set']}.npz"
    sets = [torch.from_numpy(np.load(path)["arr_0"]) for path in (tmp_path / "real.npz", folder)]
    first, second = (MeanColours()(pictures)["pool"].double() for pictures in sets)
    gap = (first.mean(0) - second.mean(0)).square().sum()
    assert float(row["FD-colours"]) >= 0.99 * gap > 0  # the Frechet distance is that of the means and more


def test_a_wrong_setting_is_found_before_anything_is_drawn(run, tmp_path):
    with pytest.raises(SystemExit):
        run(rows_of_grid(["cfg-scale=1.0", "cfg-schedule=constant,steep"]))
    assert not (tmp_path / "samples").exists()


def test_the_command_measures_with_the_network_that_was_asked_for(tiny, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
    monkeypatch.setattr(sweep_c2i, "feature_network", lambda name, *_: {"lite0": MeanColours(), "none": None}[name])
    flags = ["--reference", str(tmp_path / "real.npz"), "--results", str(tmp_path / "sweep.csv"), "--features", "lite0"]
    common = [*tiny, "--num-fid-samples", "6", "--sample-dir", str(tmp_path)]
    sweep_c2i.main(*sweep_c2i.parser().parse_known_args([*flags, *common, "--sweep", "cfg-scale=1.5", "top-k=0,9"]))
    assert "| cfg-scale | top-k | KD-colours |" in capsys.readouterr().out
    for more, message in {
        (): "say what is compared",
        ("--table", "t", "--sweep", "top-k=0"): "say what is compared",
        ("--sweep", "top-k=0", "--features", "none"): "needs features",
    }.items():
        with pytest.raises(ValueError, match=message):
            sweep_c2i.main(*sweep_c2i.parser().parse_known_args([*flags, *common, *more]))
