"""Lookup-free quantization (MAGVIT-v2, Yu et al. 2023, arXiv:2310.05737): a code is the signs of the
latents. Large codebooks cost nothing; the entropy loss is what spreads the tokens over them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.nearest import row_chunks
from tokenizer.tokenizer_image.quantizers.base import Quantizer, straight_through
from tokenizer.tokenizer_image.quantizers.entropy import entropy_of

_GROUP = 10  # bits whose joint distribution is computed: 1,024 entries a token


class LFQ(Quantizer):
    """D = log2(K) channels, each quantized to -1 or 1; the index is read off the signs.

    Args:
        n_e: number of codes K, a power of two.
        beta: weight of the commitment loss.
        entropy_loss_ratio: weight of the entropy loss; without it few codes survive.
        show_usage: keep the last 65,536 codes seen in training and report the share of the codebook in them.
    """

    mark = "bit_values"
    learned = False

    def __init__(self, n_e: int, beta: float, entropy_loss_ratio: float, show_usage: bool) -> None:
        super().__init__(n_e, lfq_width(n_e), show_usage)
        self.beta, self.entropy_loss_ratio = beta, entropy_loss_ratio
        self.register_buffer("bit_values", 2 ** torch.arange(self.e_dim))
        self._register_usage()

    def assign(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        bits = latents.detach() > 0
        codes = bits.to(latents.dtype) * 2 - 1
        indices = (bits * self.bit_values).sum(-1)
        commit_loss = self.beta * F.mse_loss(latents, codes)
        losses = (latents.new_zeros(()), commit_loss, self._entropy_loss(latents))
        return straight_through(latents, codes), losses, indices

    def codebook(self) -> Tensor:
        numbers = torch.arange(self.n_e, device=self.bit_values.device)[:, None]
        return ((numbers // self.bit_values) % 2) * 2.0 - 1

    def _entropy_loss(self, latents: Tensor) -> Tensor:
        """Mean entropy of a token's soft code minus the entropy of the mean code; see `bit_logits`.

        Bits of one token are independent, so its entropy is a sum. The mean over tokens is a joint distribution: it
        is computed for groups of up to ten bits, whose entropies add up to a bound for more bits than that.
        """
        if self.entropy_loss_ratio == 0 or not self.training:
            return latents.new_zeros(())
        logits = bit_logits(latents)
        ones = logits.sigmoid()
        own = (F.softplus(logits) - logits * ones).sum(-1).mean()  # -p log p - (1 - p) log(1 - p), finite everywhere
        groups = torch.arange(self.e_dim).chunk(-(-self.e_dim // _GROUP))
        together = sum(entropy_of(mean_joint(ones[:, group])) for group in groups)
        return self.entropy_loss_ratio * (own - together)


def lfq_width(n_e: int) -> int:
    """Channels of a codebook of `n_e` signs: its binary logarithm."""
    width = round(math.log2(n_e)) if n_e > 1 else 0
    if 2**width != n_e or not width:
        raise ValueError(f"LFQ needs a power of two as the codebook's size, but got {n_e}.")
    return width


def bit_logits(latents: Tensor) -> Tensor:
    """Log-odds of each bit: softmax over -|z - c|^2 for c = 1 and c = -1, two numbers that differ by 4 z."""
    return 4 * latents


def mean_joint(ones: Tensor) -> Tensor:
    """Mean over tokens of the joint distribution of independent bits: (N, D) probabilities of a 1 to (2^D,)."""
    total = ones.new_zeros(2 ** ones.shape[1])
    for chunk in ones.split(row_chunks(len(ones), len(total))):
        joint = chunk.new_ones(len(chunk), 1)
        for bit in chunk.unbind(1):
            joint = torch.cat([joint * (1 - bit[:, None]), joint * bit[:, None]], dim=1)
        total = total + joint.sum(0)
    return total / len(ones)
