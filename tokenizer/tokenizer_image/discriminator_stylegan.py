"""StyleGAN-style discriminator: residual blocks halve a fixed-size image down to 4x4, then one logit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def leaky_relu(p: float = 0.2) -> nn.LeakyReLU:
    """The activation of all layers, in place."""
    return nn.LeakyReLU(p, inplace=True)


def exists(val: Any) -> bool:
    """Whether `val` is not None."""
    return val is not None


class Blur(nn.Module):
    """3x3 binomial low-pass filter with reflected borders; shape is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = torch.outer(self.f, self.f).to(x.dtype)
        kernel = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)


class DiscriminatorBlock(nn.Module):
    """Two convolutions around a 1x1 shortcut; halves height and width unless `downsample` is off."""

    def __init__(self, input_channels: int, filters: int, downsample: bool = True) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(input_channels, filters, 1, stride=2 if downsample else 1)
        self.net = nn.Sequential(
            nn.Conv2d(input_channels, filters, 3, padding=1),
            leaky_relu(),
            nn.Conv2d(filters, filters, 3, padding=1),
            leaky_relu(),
        )
        strided = nn.Sequential(Blur(), nn.Conv2d(filters, filters, 3, stride=2, padding=1))
        self.downsample = strided if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        if exists(self.downsample):
            h = self.downsample(h)
        return (h + self.conv_res(x)) / math.sqrt(2)


class Discriminator(nn.Module):
    """Images (B, input_nc, image_size, image_size) to one logit each, (B, 1).

    Args:
        ndf, n_layers: not used; there so that both discriminators are built alike.
        channel_multiplier: factor on the channels of the resolutions from 64 on.
        image_size: a power of two from 8 to 1024.
    """

    def __init__(
        self,
        input_nc: int = 3,
        ndf: int = 64,
        n_layers: int = 3,
        channel_multiplier: int = 1,
        image_size: int = 256,
    ) -> None:
        super().__init__()
        width = {2**n: 512 for n in range(2, 6)}
        width |= {2**n: 2 ** (14 - n) * channel_multiplier for n in range(6, 11)}
        if image_size not in width or image_size == 4:
            raise ValueError(f"image_size must be a power of two from 8 to 1024, but is {image_size}.")
        self.image_size = image_size
        sizes = [2**n for n in range(image_size.bit_length() - 1, 1, -1)]
        self.blocks = nn.ModuleList([nn.Conv2d(input_nc, width[image_size], 3, padding=1), leaky_relu()])
        self.blocks.extend(DiscriminatorBlock(width[size], width[half]) for size, half in pairwise(sizes))
        self.final_conv = nn.Sequential(nn.Conv2d(width[4], width[4], 3, padding=1), leaky_relu())
        self.final_linear = nn.Sequential(nn.Linear(width[4] * 4 * 4, width[4]), leaky_relu(), nn.Linear(width[4], 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"This discriminator was built for {self.image_size}x{self.image_size} images, "
                f"but got {x.shape[-2]}x{x.shape[-1]}."
            )
        for block in self.blocks:
            x = block(x)
        return self.final_linear(self.final_conv(x).flatten(1))
