"""Convolutional building blocks shared by every tokenizer in this package.

Feature maps are NCHW. All blocks follow one pattern: normalise, swish, convolve, add to the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def nonlinearity(x: Tensor) -> Tensor:
    """Swish: ``x * sigmoid(x)``."""
    return F.silu(x)


def Normalize(in_channels: int, norm_type: str = "group", norm_groups: int = 32) -> nn.Module:
    """The normalisation of all blocks: GroupNorm ('group', eps 1e-6) or SyncBatchNorm ('batch')."""
    if norm_type == "group":
        return nn.GroupNorm(norm_groups, in_channels, eps=1e-6, affine=True)
    if norm_type == "batch":
        return nn.SyncBatchNorm(in_channels)
    raise ValueError(f"norm_type must be 'group' or 'batch', but is {norm_type!r}.")


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut; (B, in, H, W) to (B, out, H, W).

    Where the width changes, the shortcut is a 1x1 convolution, or a 3x3 one with `conv_shortcut`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        norm_type: str = "group",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.norm1 = Normalize(in_channels, norm_type, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels, norm_type, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut_name = None
        if in_channels != out_channels:
            self.shortcut_name = "conv_shortcut" if conv_shortcut else "nin_shortcut"
            size = 3 if conv_shortcut else 1
            self.add_module(self.shortcut_name, nn.Conv2d(in_channels, out_channels, size, padding=size // 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        shortcut = getattr(self, self.shortcut_name)(x) if self.shortcut_name else x
        return shortcut + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all H*W positions, added to the input; shape is kept."""

    def __init__(self, in_channels: int, norm_type: str = "group", norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = Normalize(in_channels, norm_type, norm_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (self._positions(project(normed)) for project in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H*W, C)
        return x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))

    @staticmethod
    def _positions(x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, one head, H*W, C)."""
        return x.flatten(2).transpose(1, 2).unsqueeze(1)


class Upsample(nn.Module):
    """Twice the height and width by repeating pixels, then optionally a 3x3 convolution."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Half the height and width: a strided 3x3 convolution, or 2x2 average pooling without it."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        # The trained weights expect padding at the right and at the bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def residual_stack(
    in_channels: int,
    out_channels: int,
    depth: int,
    attention: bool,
    dropout: float = 0.0,
    norm_type: str = "group",
    norm_groups: int = 32,
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The blocks of one resolution: `depth` residual blocks, the first of which changes the width, and
    as many attention blocks (none without `attention`). `run_stack` applies them alternately."""
    norm = {"norm_type": norm_type, "norm_groups": norm_groups}
    widths = [in_channels] + [out_channels] * (depth - 1)
    blocks = [ResnetBlock(width, out_channels, dropout=dropout, **norm) for width in widths]
    attentions = [AttnBlock(out_channels, **norm) for _ in range(depth if attention else 0)]
    return nn.ModuleList(blocks), nn.ModuleList(attentions)


def run_stack(x: Tensor, blocks: nn.ModuleList, attentions: nn.ModuleList) -> Tensor:
    """Apply what `residual_stack` made."""
    for i, block in enumerate(blocks):
        x = block(x)
        if attentions:
            x = attentions[i](x)
    return x


class CodeAutoencoder(nn.Module):
    """Encoder, quantizer and decoder, with a 1x1 convolution before and after the quantizer.

    Args:
        stride: pixels in each direction that become one code.
        z_channels: what the encoder gives and the decoder takes.
        code_channels: channels of a code, D.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        quantize: nn.Module,
        *,
        stride: int,
        z_channels: int,
        code_channels: int,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.encoder, self.decoder, self.quantize = encoder, decoder, quantize
        self.quant_conv = nn.Conv2d(z_channels, code_channels, 1)
        self.post_quant_conv = nn.Conv2d(code_channels, z_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Any, tuple[None, None, Tensor]]:
        """Images (B, 3, H, W) to ``(quant, losses, (None, None, indices))``, see the quantizer's `forward`.

        `quant` is (B, D, H/stride, W/stride), `indices` (B * H/stride * W/stride,) int64.
        Raises ValueError if height or width is not a multiple of `stride`.
        """
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"Height and width must be multiples of {self.stride}, but are {height} and {width}: crop or pad."
            )
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantized latents (B, D, h, w) to images (B, 3, h*stride, w*stride)."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True) -> Tensor:
        """Codes to images (B, 3, h*stride, w*stride).

        Args:
            code_b: indices, B*h*w in all, in order batch, row, column.
            shape: (B, D, h, w), or (B, h, w, D) with `channel_first` off.
        """
        if shape is None:
            raise ValueError("decode_code needs the shape of the latents: (batch, channels, rows, columns).")
        quant = self.quantize.get_codebook_entry(code_b, shape, channel_first)
        return self.decode(quant if channel_first else quant.permute(0, 3, 1, 2).contiguous())

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        """Images to their reconstructions, and what the quantizer says of its losses."""
        quant, losses, _ = self.encode(input)
        return self.decode(quant), losses
