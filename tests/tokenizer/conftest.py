"""Seven tiny images and tiny tokenizers of every kind, for the commands that reconstruct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.commands.shell import make_images
from tests.tokenizer.test_vqgan import TINY
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.vqgan.model import VQModel
from utils import checkpoint

COUNT = 7  # a multiple neither of two processes nor of the batches


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Seven images in three classes, the same in one folder, and a tokenizer whose outputs are not all alike."""
    work = tmp_path_factory.mktemp("reconstruction")
    make_images(work / "images", 3)
    for path in sorted((work / "images").rglob("*.png"))[COUNT:]:
        path.unlink()
    (work / "flat").mkdir()
    for number, path in enumerate(sorted((work / "images").rglob("*.png"))):
        (work / f"flat/{number}.png").write_bytes(path.read_bytes())
    torch.manual_seed(0)
    model = VQ_models["VQ-4-S"](codebook_size=64)
    model.decoder.conv_out.weight.data *= 4
    checkpoint.save({"model": model.state_dict(), "ema": model.state_dict()}, work / "vq.pt")
    return work


@pytest.fixture(scope="session")
def tokenizer(work):
    model = VQ_models["VQ-4-S"](codebook_size=64)
    model.load_state_dict(checkpoint.read(work / "vq.pt")["model"])
    return model.eval()


@pytest.fixture(scope="session")
def vqgan(work) -> Path:
    """vqgan.yaml and vqgan.pth of a tiny taming model of stride 2, beside the weights of its training loss."""
    params = {"ddconfig": TINY, "n_embed": 16, "embed_dim": 4, "monitor": "val/rec_loss", "lossconfig": {"target": "x"}}
    (work / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    torch.manual_seed(1)
    state = VQModel(TINY, 16, 4).state_dict()
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(1)}}, work / "vqgan.pth")
    return work


def diffusers_model(folder: Path, kind: str, **config: object) -> Path:
    """A folder of a diffusers model with random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    getattr(diffusers, kind)(**config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    return diffusers_model(
        tmp_path_factory.mktemp("vae"), "AutoencoderKL",
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    return diffusers_model(
        tmp_path_factory.mktemp("cd"), "ConsistencyDecoderVAE",
        encoder_block_out_channels=(8, 8), encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_norm_num_groups=4, decoder_block_out_channels=(8, 8), decoder_layers_per_block=1,
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2, decoder_norm_num_groups=4,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )  # fmt: skip
