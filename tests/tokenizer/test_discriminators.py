"""Both discriminators: parity, state-dict layout, initialisation and checks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import golden
from tests.tokenizer.builders import count, gradient_norms, hash_fill, keys_of, stored_keys, uniform
from tokenizer.tokenizer_image import discriminator as both
from tokenizer.tokenizer_image.discriminator_patchgan import ActNorm, NLayerDiscriminator
from tokenizer.tokenizer_image.discriminator_stylegan import (
    Blur,
    Discriminator,
    DiscriminatorBlock,
    exists,
    leaky_relu,
)


@golden.cases("disc.patchgan")
def test_patchgan(case):
    model = case.fill(NLayerDiscriminator(**case.config))
    x = case.tensors["x"]
    outputs = {"eval": model.eval()(x), "train": model.train()(x)}
    state = model.state_dict()
    outputs |= {f"after.{key}": state[key].clone() for key in case.params["state_after_train"]}
    outputs["eval_after_train"] = model.eval()(x)
    model.zero_grad()
    x.requires_grad_()
    model.train()(x).mean().backward()
    case.check({**outputs, "grad_x": x.grad, "grad_l2": gradient_norms(model)})


@golden.cases("disc.stylegan")
def test_stylegan(case):
    model = case.fill(Discriminator(**case.config))
    x = case.tensors["x"].requires_grad_()
    y = model(x)
    y.sum().backward()
    case.check({"y": y, "grad_x": x.grad, "param_count": count(model)})


@golden.cases("disc.blur")
def test_blur(case):
    case.check({"y": Blur()(case.tensors["x"])})


@torch.no_grad()
def test_hashed_patchgan():
    model = hash_fill(NLayerDiscriminator())
    x = uniform("input", (2, 3, 64, 64))
    logits = model(x)
    assert logits.shape == (2, 1, 6, 6)
    assert logits.mean().item() == pytest.approx(0.103661590, abs=1e-9)
    assert logits.flatten()[:3].tolist() == pytest.approx([0.11504387, 0.17380404, 0.09755694], abs=1e-8)
    logits = model.train()(x)
    assert logits.mean().item() == pytest.approx(0.208918837, abs=1e-9)
    assert logits.flatten()[:2].tolist() == pytest.approx([0.47496005, -0.14867735], abs=1e-8)


@torch.no_grad()
def test_hashed_stylegan():
    logits = hash_fill(Discriminator(image_size=64))(uniform("input", (2, 3, 64, 64)))
    assert logits.flatten().tolist() == pytest.approx([-0.01659797, -0.02703428], abs=1e-8)


@pytest.mark.parametrize(
    ("options", "params", "entries", "side"),
    [
        ({}, 2_765_633, 22, 30),
        ({"n_layers": 2}, 663_361, 16, 62),
        ({"n_layers": 4}, 6_960_961, 28, 14),
        ({"use_actnorm": True}, 2_766_529, 19, 30),
    ],
)
def test_patchgan_layout(options, params, entries, side):
    with torch.device("meta"):
        model = NLayerDiscriminator(**options)
        assert model.eval()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, side, side)
    assert (count(model), len(model.state_dict())) == (params, entries)
    if not options:
        assert keys_of(model) == stored_keys("patchgan_default")


@pytest.mark.parametrize(("size", "params", "entries"), [(256, 36_500_225, 62), (512, 36_593_793, 71)])
def test_stylegan_layout(size, params, entries):
    with torch.device("meta"):
        model = Discriminator(image_size=size)
    assert (count(model), len(model.state_dict())) == (params, entries)
    assert keys_of(model) == stored_keys(f"stylegan_{size}")
    assert Blur().f.tolist() == [1, 2, 1]


def test_patchgan_initialisation():
    torch.manual_seed(0)
    model = NLayerDiscriminator()
    assert model.main[8].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.main[9].weight.mean().item() == pytest.approx(1, abs=0.005)
    assert model.main[9].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.main[9].bias.any() and model.main[0].bias.any()


@pytest.mark.parametrize("size", [384, 4, 2048])
def test_stylegan_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"power of two from 8 to 1024, but is {size}"):
        Discriminator(image_size=size)


def test_stylegan_refuses_other_images():
    with pytest.raises(ValueError, match="built for 16x16 images, but got 16x32"):
        Discriminator(image_size=16)(torch.zeros(1, 3, 16, 32))


def test_stylegan_channel_multiplier():
    with torch.device("meta"):
        model = Discriminator(image_size=128, channel_multiplier=2)
    assert model.blocks[0].weight.shape[0] == 256
    assert model.blocks[2].conv_res.weight.shape == (512, 256, 1, 1)


def test_block_without_downsampling():
    assert DiscriminatorBlock(3, 5, downsample=False)(torch.rand(1, 3, 6, 6)).shape == (1, 5, 6, 6)
    assert DiscriminatorBlock(3, 5)(torch.rand(1, 3, 6, 6)).shape == (1, 5, 3, 3)
    assert exists(0) and not exists(None)
    assert leaky_relu()(torch.tensor(-1.0)).item() == pytest.approx(-0.2)


class TestActNorm:
    """Data-dependent normalisation."""

    def test_first_batch_gets_zero_mean_and_unit_deviation(self):
        norm = ActNorm(3, logdet=True).train()
        x = 5 + 3 * torch.randn(4, 3, 6, 6)
        y, logdet = norm(x)
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3))
        torch.testing.assert_close(logdet, torch.full((4,), 36 * norm.scale.abs().log().sum().item()))
        assert norm.initialized == 1
        scale = norm.scale.clone()
        norm(10 * x)
        assert torch.equal(norm.scale, scale)

    def test_reverse(self):
        norm = ActNorm(3).train()
        x = 5 + 3 * torch.randn(8, 3)
        y = norm(x)
        assert y.shape == (8, 3)
        torch.testing.assert_close(norm(y, reverse=True), x)

    def test_evaluation_does_not_initialise(self):
        norm = ActNorm(3).eval()
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(norm(x), x)
        assert norm.initialized == 0


def test_aliases():
    assert both.PatchGANDiscriminator is NLayerDiscriminator
    assert both.StyleGANDiscriminator is Discriminator
    assert (both.ActNorm, both.Blur, both.DiscriminatorBlock) == (ActNorm, Blur, DiscriminatorBlock)
    assert issubclass(both.StyleGANDiscriminator, nn.Module)
