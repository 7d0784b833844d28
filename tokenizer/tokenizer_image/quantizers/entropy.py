"""The entropy loss: each token sure of its code, all tokens together using all codes.

As in MaskGIT's and MAGVIT-v2's tokenizers (Yu et al. 2023, arXiv:2310.05737).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokenizer.nearest import row_chunks

ENTROPY_TEMPERATURE = 0.01


def compute_entropy_loss(
    affinity: Tensor, loss_type: str = "softmax", temperature: float = ENTROPY_TEMPERATURE
) -> Tensor:
    """Mean entropy of the code distribution of a token, minus the entropy of the mean distribution.

    Args:
        affinity: (..., K) similarity of every token to every code, such as the negative squared distance.
        loss_type: 'softmax', the only one known.
    """
    if loss_type != "softmax":
        raise ValueError(f"loss_type must be 'softmax', but is {loss_type!r}.")
    affinity = affinity.reshape(-1, affinity.shape[-1])
    return entropy_difference(*entropy_sums(affinity / temperature), len(affinity))


def chunked_entropy_loss(latents: Tensor, codebook: Tensor, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`compute_entropy_loss` of (N, D) latents and (K, D) codes, without ever holding the whole (N, K) matrix.

    `logits` gives (n, K) logits of a chunk; they are computed again in the backward pass, so that only one chunk is
    alive at a time.
    """

    def sums(chunk: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return entropy_sums(logits(chunk, codes))

    entropies, probabilities = [], []
    for chunk in latents.split(row_chunks(len(latents), len(codebook))):
        entropy, probability = checkpoint(sums, chunk, codebook, use_reentrant=False)
        entropies.append(entropy)
        probabilities.append(probability)
    return entropy_difference(torch.stack(entropies).sum(), torch.stack(probabilities).sum(0), len(latents))


def distance_logits(latents: Tensor, codebook: Tensor) -> Tensor:
    """Negative squared distance over the temperature, without |z|^2, which is the same for all codes."""
    return (2 * latents @ codebook.T - codebook.square().sum(1)) / ENTROPY_TEMPERATURE


def entropy_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the rows of (N, K) logits: of the row entropies, 0-d, and of the probabilities, (K,)."""
    log_probability = F.log_softmax(logits, dim=-1)
    probability = log_probability.exp()
    return -(probability * log_probability).sum(), probability.sum(0)


def entropy_difference(entropy_sum: Tensor, probability_sum: Tensor, tokens: int) -> Tensor:
    """Mean entropy minus entropy of the mean, from the sums over `tokens` rows."""
    return entropy_sum / tokens - entropy_of(probability_sum / tokens)


def entropy_of(probability: Tensor) -> Tensor:
    """Entropy of the distributions in the last dimension, in nats."""
    return -(probability * torch.log(probability + 1e-5)).sum(-1)
