"""The benchmark's graph is the published one, and its last line is one JSON object."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import evaluation
from evaluations.features import check_pictures
from evaluations.graph_file import read_graph
from evaluations.inception import INPUT, POOL, SPATIAL, GraphNetwork, Inception, check_topology

NARROW = " ".join(str(max(int(width) // 16, 7)) for width in evaluation.WIDTHS.split())


def test_the_written_graph_has_the_published_layers(tmp_path):
    path = tmp_path / "graph.pb"
    evaluation.write_graph(path, NARROW)
    check_topology(GraphNetwork(read_graph(path), INPUT, (POOL, SPATIAL)), path)
    seen = Inception(path)(torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8))
    assert seen["pool"].isfinite().all() and seen["pool"].std() > 0
    assert seen["spatial"].shape == (2, 2023) and seen["probabilities"].shape == (2, 1008)


def test_the_full_graph_has_the_published_size():
    channels = evaluation.GraphWriter([int(width) for width in evaluation.WIDTHS.split()], classes=1).channels
    assert channels[POOL] == evaluation.FEATURES and channels["mixed_7/join"] == 768 and channels["mixed/join"] == 256


class Fast:
    """Twice as fast as nothing."""

    label, comparable = "fast", False

    def __call__(self, pictures):
        check_pictures(pictures)
        return {"pool": pictures.float().mean(dim=(1, 2))}


@pytest.fixture
def fast(monkeypatch):
    """No network and no large matrices; as installed, TensorFlow is."""
    monkeypatch.setattr(evaluation, "write_graph", lambda _: None)
    monkeypatch.setattr(evaluation, "load_network", lambda *_: Fast())
    distance = evaluation.measure_distance(torch.device("cpu"), 60, 16)
    assert distance["relative_difference"] < 1e-6
    monkeypatch.setattr(evaluation, "measure_distance", lambda _: distance)
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: True)
    return distance


def measured(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluation.py", "--images", "9", "--size", "8", "--rounds", "2", *flags])
    evaluation.main()
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_the_last_line_is_one_json_object(fast, monkeypatch, capsys):
    threads = []
    monkeypatch.setattr(evaluation.torch, "set_num_threads", threads.append)
    lines, result = measured(monkeypatch, capsys)
    assert len(lines) == 4 and result["largest_difference"] == 0 and result["distance"] == fast
    assert result["speedup"] == pytest.approx(result["torch"] / result["tensorflow"], rel=0.01)
    measured(monkeypatch, capsys, "--num-threads", "3")
    assert threads == [1, 3]


def test_without_tensorflow_pytorch_is_measured_alone(fast, monkeypatch, capsys):
    monkeypatch.setattr(evaluation.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: None)
    lines, result = measured(monkeypatch, capsys)
    assert lines[0] == "TensorFlow is not installed: PyTorch is measured alone" and len(lines) == 3
    assert result["speedup"] is None and "tensorflow" not in result and result["torch"] > 0


def test_a_gpu_keeps_the_threads_and_tries_both_layouts(fast, monkeypatch, capsys):
    made, threads = [], []
    monkeypatch.setattr(evaluation, "Inception", lambda graph, *form: made.append(form) or Fast())
    monkeypatch.setattr(evaluation.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(evaluation.torch.cuda, "synchronize", lambda _: None)
    _, result = measured(monkeypatch, capsys, "--device", "cuda")
    assert made == [(torch.device("cuda"), torch.contiguous_format)] and threads == []
    assert result["torch_channels_first"] > 0 and result["device"] == "cuda"
