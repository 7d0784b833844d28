"""Encoder and decoder of the taming-transformers VQGAN, with its module names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from tokenizer.layers import (
    AttnBlock,
    Downsample,
    Normalize,
    ResnetBlock,
    Upsample,
    nonlinearity,
    residual_stack,
    run_stack,
)

__all__ = [
    "AttnBlock",
    "Decoder",
    "Downsample",
    "Encoder",
    "Normalize",
    "ResnetBlock",
    "Upsample",
    "nonlinearity",
]


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where there is any."""

    def __init__(self, stack: tuple[nn.ModuleList, nn.ModuleList]) -> None:
        super().__init__()
        self.block, self.attn = stack

    def forward(self, x: Tensor) -> Tensor:
        return run_stack(x, self.block, self.attn)


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, dropout=dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) to latents (B, z_channels, H/s, W/s), s = 2 ** (levels - 1).

    Args:
        resolution: nominal image side; level i has side ``resolution / 2**i``, whatever the real input.
        attn_resolutions: nominal sides at which residual blocks are followed by attention.
        double_z: twice as many latent channels.

    Further keywords, such as `out_ch`, are meant for the decoder.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Collection[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        **_decoder_options: Any,
    ) -> None:
        super().__init__()
        widths = [ch, *(ch * m for m in ch_mult)]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise(widths)):
            attention = resolution // 2**i in attn_resolutions
            level = Level(residual_stack(before, width, num_res_blocks, attention, dropout))
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = Middle(widths[-1], dropout)
        self.norm_out = Normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if level is not self.down[-1]:
                h = level.downsample(h)
        return self.conv_out(nonlinearity(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) to an image (B, out_ch, h*s, w*s), s = 2 ** (levels - 1).

    `up[0]` is the finest level, applied last. Arguments as in `Encoder`.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Collection[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        resolution: int,
        z_channels: int,
        **_encoder_options: Any,
    ) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout)
        self.up = nn.ModuleList()
        for i, (width, before) in enumerate(pairwise([*widths, widths[-1]])):
            attention = resolution // 2**i in attn_resolutions
            level = Level(residual_stack(before, width, num_res_blocks + 1, attention, dropout))
            if i > 0:
                level.upsample = Upsample(width, resamp_with_conv)
            self.up.append(level)
        self.norm_out = Normalize(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if level is not self.up[0]:
                h = level.upsample(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))
