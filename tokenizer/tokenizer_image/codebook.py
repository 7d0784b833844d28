"""Care of a codebook in training: a start from data, and new life for codes that nobody uses.

A codebook drawn at random lies far from the first latents, so that few codes are ever chosen. Both functions
place codes with `Quantizer.replace`; with several processes, give all of them the same latents and randomness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.nearest import nearest_codes
from tokenizer.tokenizer_image.quantizers.base import Quantizer


@torch.no_grad()
def kmeans_init(
    quantizer: Quantizer, latents: Tensor, iterations: int = 8, generator: torch.Generator | None = None
) -> None:
    """Set the codes to the k-means centres of `latents` (spherical k-means where codes are unit-length).

    Args:
        latents: (N, D) float, what the encoder and `quant_conv` gave for some images. Best N >> K.
        iterations: rounds of assignment and averaging. A centre without latents moves onto a random one.
        generator: source of the random choices; the global one by default.
    """
    latents = _prepare(quantizer, latents)
    unit_length = getattr(quantizer, "l2_norm", False)
    centres = _draw(latents, quantizer.n_e, generator)
    for _ in range(iterations):
        nearest = nearest_codes(latents, centres, unit_length)
        members = torch.bincount(nearest, minlength=quantizer.n_e)
        sums = torch.zeros_like(centres).index_add_(0, nearest, latents)
        centres = quantizer.place(sums / members.clamp(min=1)[:, None])
        empty = members == 0
        centres[empty] = _draw(latents, int(empty.sum()), generator)
    quantizer.replace(torch.ones_like(empty), centres)


@torch.no_grad()
def revive_dead_codes(
    quantizer: Quantizer, used: Tensor, latents: Tensor, generator: torch.Generator | None = None
) -> int:
    """Move every unused code onto a random latent vector.

    Args:
        used: (K,) bool, False where the code counts as dead.
        latents: (N, D) float, what the encoder and `quant_conv` gave for recent images.
        generator: source of the random choices; the global one by default.

    Returns:
        How many codes were moved.
    """
    if used.dtype != torch.bool or tuple(used.shape) != (quantizer.n_e,):
        raise ValueError(
            f"used must be a bool tensor of shape ({quantizer.n_e},), but is {used.dtype} of shape {tuple(used.shape)}."
        )
    latents = _prepare(quantizer, latents)
    dead = ~used.to(latents.device)
    count = int(dead.sum())
    quantizer.replace(dead, _draw(latents, count, generator))
    return count


def _prepare(quantizer: Quantizer, latents: Tensor) -> Tensor:
    if latents.ndim != 2 or latents.shape[1] != quantizer.e_dim or not len(latents):
        raise ValueError(f"latents must be (N > 0, {quantizer.e_dim}), but are {tuple(latents.shape)}.")
    return quantizer.place(latents.to(quantizer.codebook().device, torch.float32))


def _draw(latents: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` random rows, without repetition as long as there are enough."""
    device = generator.device if generator is not None else latents.device
    rounds = -(-count // len(latents))
    orders = [torch.randperm(len(latents), generator=generator, device=device) for _ in range(rounds)]
    chosen = torch.cat([*orders, torch.empty(0, dtype=torch.int64, device=device)])[:count]
    return latents[chosen.to(latents.device)]
