"""The taming-transformers VQGAN: parity, published configs, quantizer options and checkpoint loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from tests import golden
from tests.tokenizer.builders import count, hash_fill, key_digest, keys_of, stored_keys, uniform
from tokenizer.vqgan.model import VQGAN_FROM_TAMING, VQModel
from tokenizer.vqgan.quantize import VectorQuantizer, VectorQuantizer2

ROOT = Path(__file__).parents[2]
TINY = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}


def _published(name: str, **options) -> VQModel:
    config = yaml.safe_load((ROOT / VQGAN_FROM_TAMING[name][0]).read_text())
    return VQModel(**config["model"]["params"], **options)


@golden.cases("vqgan.eval")
@torch.no_grad()
def test_evaluation(case):
    model = case.fill(VQModel(**case.config)).eval()
    quant, loss, (_, _, indices) = model.encode(case.tensors["x"])
    outputs = {
        "pre_quant": model.quant_conv(model.encoder(case.tensors["x"])),
        "quant": quant,
        "indices": indices,
        "loss": loss,
        "recon": model.decode(quant),
        "recon_of_codes": model.decode_code(case.tensors["codes"], quant.shape),
        "param_count": count(model),
    }
    for name, (a, b, c) in case.params.get("strides", {}).items():
        outputs[name] = outputs[name][:, ::a, ::b, ::c]
    case.check(outputs)


HASHED = {
    "vqgan_imagenet_f16_1024": ([861, 40, 520, 666], 0.4920033524, -0.478079552, -0.23919981),
    "vqgan_openimage_f8_256": (
        [193, 21, 144, 183, 106, 184, 172, 172, 245, 227, 245, 245, 184, 103, 183, 246],
        0.1105331001,
        -0.228674281,
        -0.10852343,
    ),
}


@pytest.mark.parametrize("name", HASHED)
@torch.no_grad()
def test_hashed_weights(name):
    codes, expected_loss, mean, first = HASHED[name]
    model = hash_fill(_published(name))
    quant, loss, (_, _, indices) = model.encode(uniform("input", (1, 3, 32, 32)))
    assert indices.tolist() == codes
    assert loss.item() == pytest.approx(expected_loss, abs=1e-9)
    image = model.decode_code(indices, quant.shape)
    assert image.mean().item() == pytest.approx(mean, abs=1e-9)
    assert image.flatten()[0].item() == pytest.approx(first, abs=1e-8)


PUBLISHED = {
    "vqgan_imagenet_f16_1024": (
        72_141_699,
        [29_298_176, 42_449_795],
        "819ae0cc0fa70f76f70c1bb107693679107c8e615bc8c39536f1bad6380b2d98",
    ),
    "vqgan_imagenet_f16_16384": (
        76_073_859,
        [29_298_176, 42_449_795],
        "886736755b7de3be4c8636715c28450e9ce16b8a670022869ad6100f2986ca01",
    ),
    "vqgan_openimage_f8_256": (
        67_652_783,
        [27_397_764, 40_253_955],
        "39128dcb23a2ba3b59786b91ff4f988d134db211e2c028b24cd814d1023ea15d",
    ),
    "vqgan_openimage_f8_16384": (
        67_717_295,
        [27_397_764, 40_253_955],
        "dd29b2d3e4e2d3c0f47073f1489baaafd4f9bf06f57006267828d9cd8c357696",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layout(name):
    params, parts, digest = PUBLISHED[name]
    with torch.device("meta"):
        model = _published(name)
    assert count(model) == params
    assert [count(model.encoder), count(model.decoder)] == parts
    assert keys_of(model) == stored_keys(name)
    assert key_digest(model) == digest


def test_registry():
    assert VQGAN_FROM_TAMING.keys() == PUBLISHED.keys()
    assert [checkpoint for _, checkpoint in VQGAN_FROM_TAMING.values()] == [
        "pretrained_models/vqgan_imagenet_f16_1024/ckpts/last.pth",
        "pretrained_models/vqgan_imagenet_f16_16384/ckpts/last.pth",
        "pretrained_models/vq-f8-n256/model.pth",
        "pretrained_models/vq-f8/model.pth",
    ]
    for name, (config, _) in VQGAN_FROM_TAMING.items():
        assert config == f"tokenizer/vqgan/configs/{name}.yaml"
    imagenet = yaml.safe_load((ROOT / "tokenizer/vqgan/configs/vqgan_imagenet_f16_16384.yaml").read_text())["model"]
    assert imagenet["base_learning_rate"] == 4.5e-06
    assert imagenet["params"]["monitor"] == "val/rec_loss"
    assert imagenet["params"]["lossconfig"]["params"]["disc_weight"] == 0.75


def test_decoder_levels_run_from_coarse_to_fine():
    with torch.device("meta"):
        model = _published("vqgan_imagenet_f16_1024")
    widths = [(level.block[0].norm1.num_channels, level.block[0].norm2.num_channels) for level in model.decoder.up]
    assert widths == [(128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]
    assert model.stride == 16


def test_images_that_lose_pixels_are_refused():
    with pytest.raises(ValueError, match="multiples of 2"):
        VQModel(TINY, 16, 4).encode(torch.zeros(1, 3, 17, 16))


def test_decode_code_layouts():
    model = VQModel(TINY, 16, 4).eval()
    codes = torch.arange(16)
    first = model.decode_code(codes, (1, 4, 4, 4))
    assert torch.equal(model.decode_code(codes, (1, 4, 4, 4), channel_first=False), first)
    with pytest.raises(ValueError, match="shape of the latents"):
        model.decode_code(codes)
    with pytest.raises(IndexError):
        model.decode_code(codes - 1, (1, 4, 4, 4))


class TestQuantizer:
    """Loss forms and index remapping."""

    def test_beta_weighs_the_codebook_term_in_the_legacy_loss(self):
        z = torch.randn(1, 4, 3, 3, requires_grad=True)
        gradients = {}
        for legacy in (True, False):
            quantizer = VectorQuantizer2(16, 4, beta=0.25, legacy=legacy)
            quantizer.embedding.weight.data.copy_(uniform("codes", (16, 4)))
            _, loss, (_, _, indices) = quantizer(z)
            distance = F.mse_loss(z.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.embedding(indices))
            assert loss.item() == pytest.approx(1.25 * distance.item(), rel=1e-5)
            gradients[legacy] = torch.autograd.grad(loss, [z, quantizer.embedding.weight])
        torch.testing.assert_close(gradients[True][0], 4 * gradients[False][0])
        torch.testing.assert_close(4 * gradients[True][1], gradients[False][1])

    def test_sane_shape_and_contiguity(self):
        quant, _, (_, _, indices) = VectorQuantizer(16, 4, 0.25, sane_index_shape=True)(torch.randn(2, 4, 3, 5))
        assert indices.shape == (2, 3, 5)
        assert quant.is_contiguous()

    @pytest.mark.parametrize("unknown", ["random", "extra", 1])
    def test_remap(self, unknown, tmp_path):
        np.save(tmp_path / "used.npy", np.array([7, 2, 11]))
        quantizer = VectorQuantizer2(16, 4, 0.25, remap=str(tmp_path / "used.npy"), unknown_index=unknown)
        assert keys_of(quantizer).keys() == {"embedding.weight", "used"}
        mapped = quantizer.remap_to_used(torch.tensor([11, 7, 2, 0]))
        assert mapped[:3].tolist() == [2, 0, 1]
        assert mapped[3] == {"extra": 3, 1: 1}.get(unknown, mapped[3]) and mapped[3] < 4
        assert quantizer.unmap_to_all(torch.tensor([2, 0, 1, 3])).tolist() == [11, 7, 2, 7]
        entries = quantizer.get_codebook_entry(torch.tensor([2, 0]))
        assert torch.equal(entries, quantizer.embedding.weight[[11, 7]])

    def test_forward_gives_remapped_indices(self, tmp_path):
        np.save(tmp_path / "used.npy", np.arange(15, -1, -1))
        quantizer = VectorQuantizer2(16, 4, 0.25, remap=str(tmp_path / "used.npy"))
        quant, _, (_, _, indices) = quantizer(torch.randn(1, 4, 2, 2))
        entries = quantizer.get_codebook_entry(indices, quant.shape)
        torch.testing.assert_close(entries, quant)


class TestCheckpoint:
    """Strict loading, apart from the weights of training losses."""

    @pytest.fixture
    def saved(self, tmp_path):
        model = VQModel(TINY, 16, 4)
        path = str(tmp_path / "last.pth")
        state = {**model.state_dict(), "loss.discriminator.weight": torch.zeros(1)}
        torch.save({"state_dict": state}, path)
        return model, state, path

    def test_loads_beside_loss_weights(self, saved, capsys):
        model, _, path = saved
        loaded = VQModel(TINY, 16, 4, ckpt_path=path, lossconfig={"target": "any"}, monitor="val/rec_loss")
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
        assert path in capsys.readouterr().out
        loaded.init_from_ckpt(path, logging=False)
        assert capsys.readouterr().out == ""

    def test_missing_and_surplus_weights(self, saved, tmp_path):
        model, state, path = saved
        cut = {k: v for k, v in state.items() if k != "decoder.conv_out.bias"}
        torch.save({"state_dict": {**cut, "extra.weight": torch.zeros(1)}}, path)
        for logging in (True, False):
            with pytest.raises(ValueError, match=r"lacks \['decoder.conv_out.bias'\].*\['extra.weight'\]"):
                model.init_from_ckpt(path, logging=logging)
        torch.save({"model": state}, path)
        with pytest.raises(ValueError, match="'state_dict'"):
            model.init_from_ckpt(path)

    def test_ignored_keys_keep_their_values(self, saved):
        model, _, path = saved
        other = VQModel(TINY, 16, 4)
        before = other.quantize.embedding.weight.clone()
        other.init_from_ckpt(path, ignore_keys=["quantize"])
        assert torch.equal(other.quantize.embedding.weight, before)
        assert torch.equal(other.encoder.conv_in.weight, model.encoder.conv_in.weight)
