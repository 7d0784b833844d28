"""clean-fid's way to Inception features."""

import numpy as np
import pytest
import torch

from evaluations.clean_inception import CleanInception, clean_resize
from evaluations.distance import distance_names
from evaluations.inception import POOL, Inception
from tests.golden import FOLDER


@pytest.fixture(scope="module")
def inception():
    return Inception(FOLDER / "evaluator" / "inception_2048.pb")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("edges", "mean", "values"),
    [
        ((40, 60), 127.12185103, [70.4484, 136.8116, 191.8085, 101.1909, 71.3951, 237.8264]),
        ((700, 500), 127.41911825, [139.8865, 132.0114, 115.2015, 77.2968, 120.8587, 107.4394]),
    ],
)
def test_resizing_is_that_of_clean_fid(edges, mean, values):
    """Numbers of clean-fid 0.1.35's resizer in mode "clean" for the same noise."""
    got = clean_resize(noise(*edges))
    assert got.shape == (299, 299, 3) and got.dtype == np.float32
    assert got.mean(dtype=np.float64) == pytest.approx(mean, rel=1e-6)
    assert got[::100, ::100].ravel()[:6].tolist() == pytest.approx(values, abs=1e-3)


@pytest.mark.parametrize("edges", [(40, 60), (700, 500)])
def test_resizing_beside_the_package(edges):
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    assert np.array_equal(resize(noise(*edges)), clean_resize(noise(*edges)))


def test_nothing_is_rounded_but_overshoot_is_clipped():
    edge = np.zeros((8, 8, 3), dtype=np.uint8)
    edge[:, 4:] = 255
    resized = clean_resize(edge)
    assert resized.min() == 0 and resized.max() == 255
    assert (resized != resized.round()).any()


def test_the_network_gets_the_resized_picture(inception):
    pictures = torch.from_numpy(np.stack([noise(40, 60, seed) for seed in range(2)]))
    got = CleanInception(inception)(pictures)["pool"]
    images = torch.from_numpy(np.stack([clean_resize(picture) for picture in pictures.numpy()])).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, inception.network(images)[POOL].flatten(1))
    plain = inception(pictures)["pool"]
    assert (got - plain).abs().max() > 0.05 * plain.abs().max()  # another preprocessing, another measure


def test_unknown_weights_give_no_fid(inception):
    network = CleanInception(inception)
    assert network.comparable is False
    assert distance_names(network) == ("KD-Inception", "FD-Inception")
    assert "unknown weights" in network.label and "clean-fid" in network.label
