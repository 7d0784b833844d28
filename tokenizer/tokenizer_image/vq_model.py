"""The VQ image tokenizer (LlamaGen, section 2.1): encoder, quantizer and decoder, and its registry of sizes.

Images are (B, 3, H, W) float, RGB in [-1, 1]; decoded images are nominally in that range, but not clamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from tokenizer.layers import (
    AttnBlock,
    CodeAutoencoder,
    Downsample,
    Normalize,
    ResnetBlock,
    Upsample,
    nonlinearity,
    residual_stack,
    run_stack,
)
from tokenizer.tokenizer_image.quantizer import VectorQuantizer, compute_entropy_loss
from tokenizer.tokenizer_image.quantizers import code_shape, new_quantizer

__all__ = [
    "VQ_4_S",
    "VQ_8",
    "VQ_8_S",
    "VQ_16",
    "AttnBlock",
    "Decoder",
    "Downsample",
    "Encoder",
    "ModelArgs",
    "Normalize",
    "ResnetBlock",
    "Upsample",
    "VQModel",
    "VQ_models",
    "VectorQuantizer",
    "compute_entropy_loss",
    "model_args",
    "nonlinearity",
]


@dataclass
class ModelArgs:
    """Everything that defines a VQ model. The channel multipliers go from full to lowest resolution; the
    decoder has one residual block per level more than `num_res_blocks`. Quantizers 'fsq' and 'lfq' decide the
    code's channels by themselves, 'fsq' also the number of codes (the product of `fsq_levels`)."""

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    codebook_show_usage: bool = True
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    encoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    decoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    z_channels: int = 256
    dropout_p: float = 0.0
    ch: int = 128
    num_res_blocks: int = 2
    norm_groups: int = 32
    quantizer: str = "vq"
    fsq_levels: list[int] | None = None


class Level(nn.Module):
    """One resolution of the encoder or decoder: residual blocks with optional attention, then resampling."""

    def __init__(
        self,
        stack: tuple[nn.ModuleList, nn.ModuleList],
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.res, self.attn = stack
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        x = run_stack(x, self.res, self.attn)
        if self.downsample is not None:
            x = self.downsample(x)
        return self.upsample(x) if self.upsample is not None else x


def middle(channels: int, dropout: float, **norm: Any) -> nn.ModuleList:
    """The blocks at the lowest resolution, between the levels and the latents."""
    return nn.ModuleList(
        [
            ResnetBlock(channels, dropout=dropout, **norm),
            AttnBlock(channels, **norm),
            ResnetBlock(channels, dropout=dropout, **norm),
        ]
    )


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) to latents (B, z_channels, H/s, W/s), s = 2 ** (levels - 1)."""

    def __init__(
        self,
        in_channels: int = 3,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        norm_type: str = "group",
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        z_channels: int = 256,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        norm = {"norm_type": norm_type, "norm_groups": norm_groups}
        widths = [ch, *(ch * m for m in ch_mult)]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise(widths)):
            last = i == len(ch_mult) - 1
            stack = residual_stack(before, width, num_res_blocks, last, dropout=dropout, **norm)
            downsample = None if last else Downsample(width, resamp_with_conv)
            self.conv_blocks.append(Level(stack, downsample=downsample))
        self.mid = middle(widths[-1], dropout, **norm)
        self.norm_out = Normalize(widths[-1], **norm)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            h = block(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) to an image (B, out_channels, h*s, w*s), s = 2 ** (levels - 1)."""

    def __init__(
        self,
        z_channels: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        norm_type: str = "group",
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        out_channels: int = 3,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        norm = {"norm_type": norm_type, "norm_groups": norm_groups}
        coarse_to_fine = [ch * m for m in reversed(ch_mult)]
        widths = [coarse_to_fine[0], *coarse_to_fine]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], dropout, **norm)
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise(widths)):
            stack = residual_stack(before, width, num_res_blocks + 1, i == 0, dropout=dropout, **norm)
            upsample = Upsample(width, resamp_with_conv) if i < len(ch_mult) - 1 else None
            self.conv_blocks.append(Level(stack, upsample=upsample))
        self.norm_out = Normalize(widths[-1], **norm)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution, at which the adaptive discriminator weight compares gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            h = block(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class VQModel(CodeAutoencoder):
    """Encoder, quantizer and decoder. `stride` pixels in each direction become one code.

    `config` holds the codebook's real size and width, also where the quantizer decides them.
    """

    def __init__(self, config: ModelArgs) -> None:
        size, width = code_shape(config.quantizer, config.codebook_size, config.codebook_embed_dim, config.fsq_levels)
        config = replace(config, codebook_size=size, codebook_embed_dim=width)
        shared = {
            "ch": config.ch,
            "num_res_blocks": config.num_res_blocks,
            "dropout": config.dropout_p,
            "z_channels": config.z_channels,
            "norm_groups": config.norm_groups,
        }
        encoder = Encoder(ch_mult=config.encoder_ch_mult, **shared)
        decoder = Decoder(ch_mult=config.decoder_ch_mult, **shared)
        quantize = new_quantizer(
            config.quantizer,
            size,
            width,
            beta=config.commit_loss_beta,
            entropy_loss_ratio=config.entropy_loss_ratio,
            l2_norm=config.codebook_l2_norm,
            show_usage=config.codebook_show_usage,
            levels=config.fsq_levels,
        )
        stride = 2 ** (len(config.encoder_ch_mult) - 1)
        super().__init__(encoder, decoder, quantize, stride=stride, z_channels=config.z_channels, code_channels=width)
        self.config = config


_SMALL = {"ch": 32, "num_res_blocks": 1, "norm_groups": 8, "z_channels": 64}
_SIZES: dict[str, tuple[list[int], dict[str, int]]] = {
    "VQ-16": ([1, 1, 2, 2, 4], {}),
    "VQ-8": ([1, 2, 2, 4], {}),
    "VQ-8-S": ([1, 1, 2, 2], {**_SMALL, "codebook_size": 1024}),
    "VQ-4-S": ([1, 1, 2], {**_SMALL, "codebook_size": 512}),
}


def model_args(size: str, **fields: Any) -> ModelArgs:
    """The `ModelArgs` of a registered size, with other `fields` where given (not the channel multipliers)."""
    ch_mult, defaults = _SIZES[size]
    return ModelArgs(encoder_ch_mult=[*ch_mult], decoder_ch_mult=[*ch_mult], **{**defaults, **fields})


def VQ_8(**kwargs: Any) -> VQModel:
    """Stride 8, 70 M parameters. Keywords are fields of `ModelArgs`."""
    return VQModel(model_args("VQ-8", **kwargs))


def VQ_16(**kwargs: Any) -> VQModel:
    """Stride 16, 72 M parameters. Keywords are fields of `ModelArgs`."""
    return VQModel(model_args("VQ-16", **kwargs))


def VQ_8_S(**kwargs: Any) -> VQModel:
    """Stride 8, 1.2 M parameters, 1,024 codes: trains on a laptop. Keywords are fields of `ModelArgs`."""
    return VQModel(model_args("VQ-8-S", **kwargs))


def VQ_4_S(**kwargs: Any) -> VQModel:
    """Stride 4, 0.9 M parameters, 512 codes: trains on a laptop. Keywords are fields of `ModelArgs`."""
    return VQModel(model_args("VQ-4-S", **kwargs))


VQ_models = {"VQ-16": VQ_16, "VQ-8": VQ_8, "VQ-8-S": VQ_8_S, "VQ-4-S": VQ_4_S}
