"""LPIPS, the learned perceptual distance of images (Zhang et al. 2018), with the VGG16 trunk."""

from __future__ import annotations

from collections import OrderedDict
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenizer.tokenizer_image.lpips_weights import (
    CKPT_MAP,
    MD5_MAP,
    URL_MAP,
    download,
    get_ckpt_path,
    linear_weights,
    md5_hash,
    vgg16_features,
)

__all__ = [
    "CKPT_MAP",
    "LPIPS",
    "MD5_MAP",
    "URL_MAP",
    "NetLinLayer",
    "ScalingLayer",
    "download",
    "get_ckpt_path",
    "md5_hash",
    "normalize_tensor",
    "spatial_average",
    "vgg16",
]

_TAP_CHANNELS = (64, 128, 256, 512, 512)
_CONVS_PER_SLICE = (2, 2, 3, 3, 3)


class LPIPS(nn.Module):
    """Perceptual distance of two image batches. Frozen, and always in evaluation mode.

    Args:
        use_dropout: put dropout before the linear layers. Never active, but it shifts their state-dict keys.
        pretrained: load the published weights; off leaves them at random.
        weights_path: state dict of torchvision's vgg16, for machines that cannot download it.
    """

    def __init__(
        self, use_dropout: bool = True, pretrained: bool = True, weights_path: str | Path | None = None
    ) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = vgg16(pretrained=pretrained, weights_path=weights_path)
        for i, channels in enumerate(_TAP_CHANNELS):
            self.add_module(f"lin{i}", NetLinLayer(channels, use_dropout=use_dropout))
        if pretrained:
            self._load_linear_weights()
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name: str = "vgg_lpips") -> LPIPS:
        """The network with its published weights; 'vgg_lpips' is the only name."""
        if name not in CKPT_MAP:
            raise ValueError(f"The LPIPS weights must be one of {sorted(CKPT_MAP)}, but are {name!r}.")
        return cls()

    @property
    def linear_layers(self) -> list[NetLinLayer]:
        """From the shallowest VGG tap to the deepest."""
        return [getattr(self, f"lin{i}") for i in range(len(_TAP_CHANNELS))]

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode whatever `mode`: dropout would make the distance random."""
        return super().train(False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Distance of (B, 3, H, W) images in [-1, 1], sides at least 16: (B, 1, 1, 1), 0 for equal images."""
        features = zip(self.net(self.scaling_layer(input)), self.net(self.scaling_layer(target)))
        distances = [
            spatial_average(linear((normalize_tensor(f) - normalize_tensor(g)).square()))
            for linear, (f, g) in zip(self.linear_layers, features)
        ]
        return torch.stack(distances).sum(0)

    @torch.no_grad()
    def _load_linear_weights(self) -> None:
        for layer, weight in zip(self.linear_layers, linear_weights()):
            layer.model[-1].weight.copy_(weight)


class ScalingLayer(nn.Module):
    """From [-1, 1] to the colour statistics of ImageNet."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, inp: Tensor) -> Tensor:
        return (inp - self.shift) / self.scale


class NetLinLayer(nn.Module):
    """Weighted sum over channels, (B, chn_in, H, W) to (B, chn_out, H, W), with dropout in front if asked."""

    def __init__(self, chn_in: int, chn_out: int = 1, use_dropout: bool = False) -> None:
        super().__init__()
        dropout = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*dropout, nn.Conv2d(chn_in, chn_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class VggOutputs(NamedTuple):
    """The five taps of VGG16, each after the last ReLU of its resolution."""

    relu1_2: Tensor
    relu2_2: Tensor
    relu3_3: Tensor
    relu4_3: Tensor
    relu5_3: Tensor


class vgg16(nn.Module):
    """Convolutional trunk of VGG16 in five slices; layers carry the indices of torchvision's ``features``.

    Args:
        requires_grad: whether the weights are trained.
        pretrained: load the ImageNet weights, from `weights_path` if given.
    """

    def __init__(
        self, requires_grad: bool = False, pretrained: bool = True, weights_path: str | Path | None = None
    ) -> None:
        super().__init__()
        before, indices = 3, count()
        for n, (width, convs) in enumerate(zip(_TAP_CHANNELS, _CONVS_PER_SLICE), start=1):
            layers: list[nn.Module] = [] if n == 1 else [nn.MaxPool2d(2, 2)]
            for _ in range(convs):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            named = OrderedDict((str(next(indices)), layer) for layer in layers)
            self.add_module(f"slice{n}", nn.Sequential(named))
        if pretrained:
            self._load_trunk(weights_path)
        self.requires_grad_(requires_grad)

    @property
    def slices(self) -> list[nn.Sequential]:
        """In the order in which they are applied."""
        return [getattr(self, f"slice{n}") for n in range(1, 6)]

    def forward(self, X: Tensor) -> VggOutputs:
        taps = []
        for vgg_slice in self.slices:
            X = vgg_slice(X)
            taps.append(X)
        return VggOutputs(*taps)

    def _load_trunk(self, weights_path: str | Path | None) -> None:
        features = vgg16_features(weights_path)
        for vgg_slice in self.slices:
            keys = vgg_slice.state_dict().keys()
            missing = keys - features.keys()
            if missing:
                raise ValueError(f"The VGG16 weights lack {sorted(missing)} of torchvision's vgg16.features.")
            vgg_slice.load_state_dict({key: features[key] for key in keys})


def normalize_tensor(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Unit length over channels at every position; all-zero positions stay zero, with zero gradient."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)


def spatial_average(x: Tensor, keepdim: bool = True) -> Tensor:
    """Mean over height and width."""
    return x.mean([2, 3], keepdim=keepdim)
