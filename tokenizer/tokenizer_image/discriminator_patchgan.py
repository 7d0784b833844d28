"""PatchGAN discriminator: a small convolutional net that judges overlapping patches (pix2pix)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class NLayerDiscriminator(nn.Module):
    """Images (B, input_nc, H, W) to a map of logits (B, 1, h, w), one for every patch; 256 px give 30x30.

    Args:
        input_nc: image channels.
        ndf: channels of the first layer; every further layer doubles them up to ``8 * ndf``.
        n_layers: layers that halve the resolution.
        use_actnorm: `ActNorm` instead of batch normalisation.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False) -> None:
        super().__init__()
        norm = ActNorm if use_actnorm else nn.BatchNorm2d
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        for n, (before, width) in enumerate(pairwise(widths), start=1):
            stride = 2 if n < n_layers else 1
            conv = nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=use_actnorm)
            layers += [conv, norm(width), nn.LeakyReLU(0.2, True)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_weights)

    def forward(self, input: Tensor) -> Tensor:
        return self.main(input)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class ActNorm(nn.Module):
    """Per-channel ``scale * (x + loc)``, set from the first training batch to zero mean and unit deviation.

    Args:
        num_features: channels of the (B, C, H, W) or (B, C) input.
        logdet: also return the log-determinant of the map, (B,).
    """

    def __init__(self, num_features: int, logdet: bool = False) -> None:
        super().__init__()
        self.logdet = logdet
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Set `loc` and `scale` from a (B, C, H, W) batch."""
        std, mean = torch.std_mean(input, dim=(0, 2, 3), keepdim=True)
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (std + 1e-6))
        self.initialized.fill_(1)

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = input[:, :, None, None] if input.ndim == 2 else input
        if self.training and not reverse and not self.initialized:
            self.initialize(x)
        y = x / self.scale - self.loc if reverse else self.scale * (x + self.loc)
        y = y.reshape(input.shape)
        if not self.logdet or reverse:
            return y
        positions = x.shape[2] * x.shape[3]
        return y, (positions * self.scale.abs().log().sum()).expand(len(x))
