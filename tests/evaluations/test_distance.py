"""Distances between sets of pictures: what they are called, and that they follow the model."""

import pytest
import torch

from evaluations.distance import DistanceMonitor, distance_names, distances, numbered_statistics
from evaluations.features import feature_statistics, frechet
from evaluations.metrics import kernel_distance


class Colours:
    """Mean colours of the four quarters of a picture."""

    comparable = False

    def __init__(self, label="colours (four quarters), no ImageNet"):
        self.label, self.calls = label, 0

    def __call__(self, pictures):
        self.calls += len(pictures)
        return {"pool": pictures.float().unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean(dim=(2, 4)).flatten(1)}


def pictures(numbers, shift=0):
    """Picture i is noise of its own seed, made brighter by `shift`."""
    noise = [torch.randint(0, 100, (4, 4, 3), generator=torch.Generator().manual_seed(i)) for i in numbers]
    return (torch.stack(noise) + shift).byte()


def test_only_published_inception_weights_give_an_fid():
    network = Colours()
    assert distance_names(network) == ("KD-colours", "FD-colours")
    network.comparable = True
    assert distance_names(network) == ("KID", "FID")


def test_a_network_with_other_weights_is_never_called_fid():
    seen = feature_statistics(Colours("inception (unknown weights 0123)"), [pictures(range(20))], keep_features=True)
    names = distances(seen, seen)
    assert list(names) == ["KD-inception", "KD-inception std", "FD-inception"]


def test_distances_are_those_of_the_features():
    network = Colours()
    real, fake = pictures(range(40)), pictures(range(100, 130), shift=30)
    got = distances(*(feature_statistics(network, [x], keep_features=True) for x in (real, fake)), seed=3)
    kernel = kernel_distance(network(real)["pool"], network(fake)["pool"], seed=3)
    assert (got["KD-colours"], got["KD-colours std"]) == pytest.approx(kernel, rel=1e-6)
    want = frechet(*(feature_statistics(network, [x]) for x in (real, fake)))
    assert got["FD-colours"] == pytest.approx(want, rel=1e-6)


def test_features_must_have_been_kept():
    seen = feature_statistics(Colours(), [pictures(range(20))])
    kept = feature_statistics(Colours(), [pictures(range(20))], keep_features=True)
    for pair in ((seen, seen), (seen, kept), (kept, seen)):
        with pytest.raises(ValueError, match="keep_features"):
            distances(*pair)


def test_numbered_pictures_come_in_order_and_in_batches():
    asked = []

    def draw(numbers):
        asked.append(numbers)
        return pictures(numbers)

    got = numbered_statistics(Colours(), draw, 10, batch_size=4)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(got.features, Colours()(pictures(range(10)))["pool"])


def test_the_monitor_follows_the_model_and_sees_the_real_pictures_once():
    network, brightness = Colours(), [100]
    monitor = DistanceMonitor(
        network, pictures, 30, lambda numbers: pictures([1000 + i for i in numbers], brightness[0]), 20, batch_size=8
    )
    far = monitor()
    assert network.calls == 30 + 20
    brightness[0] = 0
    near = monitor()
    assert network.calls == 30 + 20 + 20
    assert near == monitor()  # the same model gives the same numbers
    assert near["FD-colours"] < far["FD-colours"] / 10 and abs(near["KD-colours"]) < far["KD-colours"] / 100
