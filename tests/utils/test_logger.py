"""Weights & Biases: used when it is there, missed by nobody when it is not."""

import sys
import types

import pytest
import torch

from utils.args import add_wandb_args, make_parser, wandb_project
from utils.logger import Metrics, create_logger


@pytest.fixture
def wandb(monkeypatch):
    """A package of that name which notes what it is given."""
    calls = types.SimpleNamespace(init=[], log=[], finished=0)

    class Run:
        def log(self, values, step):
            calls.log.append((step, values))

        def finish(self):
            calls.finished += 1

    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: (calls.init.append(settings), Run())[1]
    fake.Image = lambda grid: ("image", grid.size)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


def test_numbers_and_pictures_arrive_under_the_established_names(wandb, tmp_path):
    metrics = Metrics(tmp_path, 0, "project")
    metrics.write(3, {"loss": 2.0, "lr": 0.5})
    metrics.write_pictures(3, {"samples": torch.zeros(2, 3, 4, 4)})
    metrics.close()
    assert wandb.log == [(3, {"train_loss": 2.0, "lr": 0.5}), (3, {"samples": ("image", (14, 8))})]
    assert wandb.init[0]["project"] == "project" and wandb.init[0]["dir"] == str(tmp_path) and wandb.finished == 1


def test_a_restart_continues_the_same_run(wandb, tmp_path):
    for _ in range(2):
        Metrics(tmp_path, 0, "project").close()
    (tmp_path / "other").mkdir()
    Metrics(tmp_path / "other", 0, "project").close()
    first, second, other = (settings["id"] for settings in wandb.init)
    assert first == second != other


def test_without_a_project_nothing_is_opened(wandb, tmp_path):
    Metrics(tmp_path).close()
    assert not wandb.init and not (tmp_path / "wandb_id.txt").exists()


def test_a_missing_package_is_one_line_in_the_log(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # the import then fails
    create_logger(tmp_path)
    metrics = Metrics(tmp_path, 0, "project")
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    assert "Weights & Biases is not used" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


@pytest.mark.parametrize(
    ("flags", "project"),
    [([], "c2i_fsdp"), (["--no-wandb"], None), (["--wandb-project", "mine"], "mine")],
)
def test_flags(flags, project):
    parser = make_parser(None)
    add_wandb_args(parser, "c2i_fsdp")
    assert wandb_project(parser.parse_args(flags)) == project
    assert wandb_project(make_parser(None).parse_args([])) is None
