"""The vector quantizer with unit-length codes (LlamaGen, section 2.1; ViT-VQGAN for the normalisation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer.nearest import at_least_float32, lookup, nearest_codes, row_chunks

USAGE_WINDOW = 65_536
ENTROPY_TEMPERATURE = 0.01

# vq_loss, commit_loss, entropy_loss (None in evaluation mode) and codebook usage in [0, 1]
EmbeddingLoss = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | int]


class VectorQuantizer(nn.Module):
    """Replaces every latent vector by its nearest code and passes gradients straight through.

    Args:
        n_e: number of codes K.
        e_dim: channels D of a code.
        beta: weight of the commitment loss.
        entropy_loss_ratio: weight of the entropy loss; 0 leaves it out.
        l2_norm: compare unit-length latents with unit-length codes.
        show_usage: keep the last 65,536 codes seen in training and report the share of the codebook in them.
    """

    def __init__(
        self, n_e: int, e_dim: int, beta: float, entropy_loss_ratio: float, l2_norm: bool, show_usage: bool
    ) -> None:
        super().__init__()
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.l2_norm = l2_norm
        self.show_usage = show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        if l2_norm:
            self.embedding.weight.data.copy_(F.normalize(self.embedding.weight.data, dim=-1))
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW))

    def forward(self, z: Tensor) -> tuple[Tensor, EmbeddingLoss, tuple[None, None, Tensor]]:
        """Quantize.

        Args:
            z: (B, D, H, W) latents, any float dtype; the arithmetic is at least float32, also under autocast.

        Returns:
            ``(quant, (vq_loss, commit_loss, entropy_loss, usage), (None, None, indices))`` with `quant` like
            `z`, 0-d losses and usage, `indices` (B*H*W,) int64 in order batch, row, column. In evaluation
            mode the losses are None and the usage is 0.
        """
        with torch.autocast(z.device.type, enabled=False):
            latents = at_least_float32(z.permute(0, 2, 3, 1))
            codebook = self.embedding.weight.to(latents.dtype)
            if self.l2_norm:
                latents, codebook = F.normalize(latents, dim=-1), F.normalize(codebook, dim=-1)
            flat = latents.reshape(-1, self.e_dim)
            indices = nearest_codes(flat.detach(), codebook.detach(), self.l2_norm)
            codes = F.embedding(indices, codebook).view_as(latents)
            loss = (None, None, None, 0)
            if self.training:
                vq_loss = F.mse_loss(codes, latents.detach())
                commit_loss = self.beta * F.mse_loss(latents, codes.detach())
                loss = (vq_loss, commit_loss, self._entropy_loss(flat, codebook), self._track_usage(indices))
            quant = latents + (codes - latents).detach()
        return quant.permute(0, 3, 1, 2).contiguous().to(z.dtype), loss, (None, None, indices)

    def get_codebook_entry(
        self, indices: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Tensor:
        """Codes of the given indices, unit-length with `l2_norm`, laid out by `tokenizer.nearest.lookup`.

        `shape` is (B, D, H, W), or (B, H, W, D) without `channel_first`; None gives ``indices.shape + (D,)``.
        Raises IndexError for an index that is negative or too large.
        """
        codebook = self.embedding.weight
        if self.l2_norm:
            codebook = F.normalize(codebook, dim=-1)
        return lookup(indices, codebook, shape, channel_first)

    def _entropy_loss(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """Weighted entropy loss of (N, D) latents, without ever holding the whole (N, K) affinity matrix."""
        if self.entropy_loss_ratio == 0:
            return latents.new_zeros(())
        entropies, probabilities = [], []
        for chunk in latents.split(row_chunks(len(latents), self.n_e)):
            # Recomputed in the backward pass, so that only one chunk is alive at a time.
            entropy, probability = checkpoint(_code_entropies, chunk, codebook, use_reentrant=False)
            entropies.append(entropy)
            probabilities.append(probability)
        total_entropy, total_probability = torch.stack(entropies).sum(), torch.stack(probabilities).sum(0)
        return self.entropy_loss_ratio * _entropy_difference(total_entropy, total_probability, len(latents))

    @torch.no_grad()
    def _track_usage(self, indices: Tensor) -> Tensor | int:
        """Move the window on by the new codes; returns its distinct codes / K, a 0-d float tensor."""
        if not self.show_usage:
            return 0
        window = self.codebook_used
        newest = indices[-len(window) :].to(window.dtype)
        window.copy_(torch.cat([window[len(newest) :], newest]))
        seen = torch.zeros(self.n_e, device=window.device).scatter_(0, window.long(), 1.0)
        return seen.mean()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a usage window of any length, or none: it is a statistic, not a weight."""
        stored = state_dict.pop(f"{prefix}codebook_used", None)
        if self.show_usage:
            window = self.codebook_used.detach().clone()
            if stored is not None:
                newest = stored[-len(window) :]
                window = torch.cat([newest.new_zeros(len(window) - len(newest)), newest])
            state_dict[f"{prefix}codebook_used"] = window
        super()._load_from_state_dict(state_dict, prefix, *args)


def compute_entropy_loss(
    affinity: Tensor, loss_type: str = "softmax", temperature: float = ENTROPY_TEMPERATURE
) -> Tensor:
    """Mean entropy of the code distribution of a token, minus the entropy of the mean distribution.

    Small where every token is sure of its code while the tokens together use all codes (MaskGIT).

    Args:
        affinity: (..., K) similarity of every token to every code, such as the negative squared distance.
        loss_type: 'softmax', the only one known.
    """
    if loss_type != "softmax":
        raise ValueError(f"loss_type must be 'softmax', but is {loss_type!r}.")
    affinity = affinity.reshape(-1, affinity.shape[-1])
    return _entropy_difference(*_entropy_sums(affinity / temperature), len(affinity))


def _code_entropies(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    # Negative squared distance, without |z|^2, which is the same for all codes and leaves the softmax alone.
    affinity = 2 * latents @ codebook.T - codebook.square().sum(1)
    return _entropy_sums(affinity / ENTROPY_TEMPERATURE)


def _entropy_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the rows of (N, K) logits: of the row entropies, 0-d, and of the probabilities, (K,)."""
    log_probability = F.log_softmax(logits, dim=-1)
    probability = log_probability.exp()
    return -(probability * log_probability).sum(), probability.sum(0)


def _entropy_difference(entropy_sum: Tensor, probability_sum: Tensor, tokens: int) -> Tensor:
    mean_probability = probability_sum / tokens
    entropy_of_mean = -(mean_probability * torch.log(mean_probability + 1e-5)).sum()
    return entropy_sum / tokens - entropy_of_mean
