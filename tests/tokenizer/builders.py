"""Tiny models and deterministic weights for the tokenizer tests."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests import golden
from tokenizer.tokenizer_image.vq_loss import VQLoss
from tokenizer.tokenizer_image.vq_model import ModelArgs, VQ_models, VQModel

_LEFT_ALONE = ("codebook_used", "running_mean", "running_var", "num_batches_tracked", "f", "shift", "scale")


def build_vq(config: Mapping[str, Any]) -> VQModel:
    """The VQ model of a golden's config."""
    config = dict(config)
    factory = config.pop("factory")
    if factory != "tiny":
        return VQ_models[factory](**config["args"])
    ch_mult = config.pop("ch_mult")
    return VQModel(ModelArgs(encoder_ch_mult=ch_mult, decoder_ch_mult=ch_mult, **config))


def tiny_vq(**fields: Any) -> VQModel:
    """Stride 2, 64 codes of 8 channels, 16 channels throughout."""
    size = {"ch": 16, "num_res_blocks": 1, "norm_groups": 4, "z_channels": 16, "codebook_size": 64}
    return VQModel(ModelArgs(encoder_ch_mult=[1, 1], decoder_ch_mult=[1, 1], **{**size, **fields}))


def small_loss(disc_start: int = 1, **options: Any) -> VQLoss:
    """`VQLoss` with a tiny PatchGAN and no perceptual network, unless `options` say otherwise."""
    size = {"disc_dim": 8, "disc_num_layers": 2, "image_size": 16, "perceptual_weight": 0.0}
    return VQLoss(disc_start, **{**size, **options}, lpips_pretrained=False)


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Float64 numbers in [-1, 1) that depend on `name` and position only: an integer hash of both."""
    x = np.arange(math.prod(shape), dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    x = (x * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))) & mask
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B)) & mask
    x = x ^ (x >> np.uint64(16))
    return torch.from_numpy(2 * (x / 2**32) - 1).reshape(shape)


def hash_fill(model: nn.Module) -> nn.Module:
    """`model` in float64 and evaluation mode, its weights replaced by `uniform` numbers of useful scale."""
    state = {}
    for key, old in model.double().eval().state_dict().items():
        numbers = uniform(key, tuple(old.shape))
        if key.rsplit(".", 1)[-1] in _LEFT_ALONE:
            numbers = old
        elif key.endswith("embedding.weight"):
            pass
        elif old.ndim >= 2:
            numbers = numbers * math.sqrt(3 / math.prod(old.shape[1:]))
        else:
            numbers = 1 + 0.2 * numbers if key.endswith("weight") else 0.1 * numbers
        state[key] = numbers
    model.load_state_dict(state)
    return model


def stored_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Key and shape of every state-dict entry in a key list of the goldens."""
    entries = json.loads((golden.FOLDER / "keys" / f"{name}.json").read_text())["keys"]
    return {key: tuple(shape) for key, shape, _ in entries}


def keys_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Key and shape of every state-dict entry."""
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def key_digest(model: nn.Module) -> str:
    """SHA-256 of the sorted lines ``key AxBxC`` of the state dict."""
    lines = [f"{key} {'x'.join(map(str, shape))}" for key, shape in sorted(keys_of(model).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def gradient_norms(model: nn.Module) -> Tensor:
    """L2 norm of every parameter's gradient (0 without one), in sorted order of names."""
    named = sorted(model.named_parameters())
    return torch.stack([p.new_zeros(()) if p.grad is None else p.grad.norm() for _, p in named])


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the parameters that got no gradient."""
    return [name for name, p in model.named_parameters() if p.grad is None]
