"""The tokenizer as one would first write it: what benchmarks/tokenizer.py measures against.

The same mathematics and the same state-dict keys as `tokenizer.tokenizer_image.vq_model.VQModel`, without its care for
speed: NCHW, attention with its whole matrix, swish in two steps, a quantizer that builds the whole matrix of distances
and, in training, always the entropy term and the share of used codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image.vq_model import ModelArgs


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class PlainBlock(nn.Module):
    """A residual block."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before, groups), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = _norm(after, groups), nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_swish(self.norm1(x)))
        h = self.conv2(_swish(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class PlainAttention(nn.Module):
    """Self-attention that holds the weights of all pairs of positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, N)
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class PlainLevel(nn.Module):
    """The blocks of one resolution, then what leads to the next."""

    def __init__(self, before: int, after: int, depth: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.res = nn.ModuleList(PlainBlock(before if i == 0 else after, after, groups) for i in range(depth))
        self.attn = nn.ModuleList(PlainAttention(after, groups) for _ in range(depth if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            return self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            return self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def _middle(width: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [PlainBlock(width, width, groups), PlainAttention(width, groups), PlainBlock(width, width, groups)]
    )


class PlainEncoder(nn.Module):
    """Images to latents."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        widths = [config.ch, *(config.ch * m for m in config.encoder_ch_mult)]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths[1:]):
            last = i == len(widths) - 2
            level = PlainLevel(widths[i], width, config.num_res_blocks, last, config.norm_groups)
            if not last:
                level.downsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1], config.norm_groups)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.conv_blocks, *self.mid):
            x = part(x)
        return self.conv_out(_swish(self.norm_out(x)))


class PlainDecoder(nn.Module):
    """Latents to images."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        coarse_to_fine = [config.ch * m for m in reversed(config.decoder_ch_mult)]
        widths = [coarse_to_fine[0], *coarse_to_fine]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], config.norm_groups)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths[1:]):
            level = PlainLevel(widths[i], width, config.num_res_blocks + 1, i == 0, config.norm_groups)
            if i < len(widths) - 2:
                level.upsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            self.conv_blocks.append(level)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for part in (*self.mid, *self.conv_blocks):
            z = part(z)
        return self.conv_out(_swish(self.norm_out(z)))


class PlainQuantizer(nn.Module):
    """Unit-length codes by the whole (tokens, codes) matrix of squared distances."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.beta, self.ratio = config.commit_loss_beta, config.entropy_loss_ratio
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        self.register_buffer("codebook_used", torch.zeros(65536))

    def forward(self, z: Tensor) -> tuple[Tensor, Sequence[Tensor | float | None], Tensor]:
        """(B, D, h, w) latents to codes alike, the losses and the usage, and the indices (B * h * w,)."""
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        codebook = F.normalize(self.embedding.weight, dim=-1)
        flat = z.reshape(-1, z.shape[-1])
        distances = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
        indices = distances.argmin(1)
        codes = codebook[indices].view_as(z)
        losses: Sequence[Tensor | float | None] = (None, None, None, 0)
        if self.training:
            commit = self.beta * (codes.detach() - z).square().mean()
            losses = ((codes - z.detach()).square().mean(), commit, self._entropy(-distances), self._usage(indices))
        return (z + (codes - z).detach()).permute(0, 3, 1, 2), losses, indices

    def _entropy(self, affinity: Tensor) -> Tensor:
        probabilities, logs = torch.softmax(affinity / 0.01, 1), torch.log_softmax(affinity / 0.01, 1)
        mean = probabilities.mean(0)
        of_mean = -(mean * (mean + 1e-5).log()).sum()
        return self.ratio * (-(probabilities * logs).sum(1).mean() - of_mean)

    @torch.no_grad()
    def _usage(self, indices: Tensor) -> float:
        newest = indices[-len(self.codebook_used) :].to(self.codebook_used)
        self.codebook_used.copy_(torch.cat([self.codebook_used[len(newest) :], newest]))
        return len(self.codebook_used.unique()) / len(self.embedding.weight)


class PlainVQ(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder, self.quantize = PlainEncoder(config), PlainDecoder(config), PlainQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor | float | None], Tensor]:
        """See `PlainQuantizer.forward`."""
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, D, h, w) to images."""
        return self.decoder(self.post_quant_conv(codes))


class PlainTrainStep:
    """One step of the tokenizer and one of its discriminator: plain Adam, the discriminator's gradients of the first
    made and thrown away, numbers read off the device in every step."""

    def __init__(self, model: PlainVQ, discriminator: nn.Module, lr: float, dtype: torch.dtype | None) -> None:
        self.model, self.discriminator, self.dtype = model.train(), discriminator.train(), dtype
        self.optimizer = torch.optim.Adam(model.parameters(), lr, (0.9, 0.95))
        self.disc_optimizer = torch.optim.Adam(discriminator.parameters(), lr, (0.9, 0.95))

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None)

    def __call__(self, images: Tensor) -> float:
        self.optimizer.zero_grad()
        with self._autocast(images):
            codes, (vq, commit, entropy, _), _ = self.model.encode(images)
            outputs = self.model.decode(codes)
            loss = F.mse_loss(images, outputs) + vq + commit + entropy - 0.5 * self.discriminator(outputs).mean()
        loss.backward()
        self._update(self.optimizer, self.model)
        self.disc_optimizer.zero_grad()
        with self._autocast(images):
            real, fake = self.discriminator(images), self.discriminator(outputs.detach())
            disc_loss = 0.25 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
        disc_loss.backward()
        self._update(self.disc_optimizer, self.discriminator)
        return loss.item() + disc_loss.item()

    def _update(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
