"""TensorFlow itself, run on the fixture graph, agrees with the PyTorch network within the promised limits."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from evaluations.features import feature_statistics, frechet
from evaluations.graph_file import GraphFileError
from evaluations.inception import Inception
from evaluations.inception_tensorflow import TensorFlowInception
from evaluations.metrics import precision_recall
from tests.golden import FOLDER

pytestmark = [
    pytest.mark.slow,  # TensorFlow takes 20 seconds to import
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed"),
]
GRAPH = FOLDER / "evaluator" / "inception_2048.pb"


@pytest.fixture(scope="module")
def statistics() -> dict[str, list]:
    """Reference and samples as seen by each backend."""
    with np.load(FOLDER / "evaluator" / "pictures.npz") as stored:
        sets = [torch.from_numpy(stored[name]).split(64) for name in ("ref", "sample")]
    networks = {"torch": Inception(GRAPH), "tensorflow": TensorFlowInception(GRAPH)}
    return {
        name: [feature_statistics(network, batches, keep_features=True) for batches in sets]
        for name, network in networks.items()
    }


def test_it_is_tensorflow(statistics):
    assert ", tensorflow 2." in statistics["tensorflow"][0].label
    assert not statistics["tensorflow"][0].comparable


@pytest.mark.parametrize("which", ["pool", "spatial"])
def test_frechet_distances_agree(statistics, which):
    torch_value, tensorflow_value = (frechet(*statistics[name], which) for name in ("torch", "tensorflow"))
    assert torch_value == pytest.approx(tensorflow_value, rel=1e-4, abs=0)
    if which == "pool":
        assert abs(torch_value - tensorflow_value) < 1e-3


def test_inception_scores_agree(statistics):
    scores = [statistics[name][1].score.scores().mean().item() for name in ("torch", "tensorflow")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_precision_and_recall_agree(statistics):
    found = [
        precision_recall(*(seen.features for seen in statistics[name]), half=half)
        for name in ("torch", "tensorflow")
        for half in (False, True)
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=0.005)


def test_features_agree(statistics):
    for mine, theirs in zip(statistics["torch"], statistics["tensorflow"]):
        assert (mine.features - theirs.features).abs().max() < 1e-4 * theirs.features.abs().max()


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "bad.pb").write_bytes(b"not a graph")
    with pytest.raises(GraphFileError, match="TensorFlow does not accept the graph"):
        TensorFlowInception(tmp_path / "bad.pb")
