"""Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505): every channel is rounded to a few levels.

No codebook to learn, so no codebook losses and nothing that can collapse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenizer.tokenizer_image.quantizers.base import Quantizer, straight_through

# Levels for about 2^8, 2^10, 2^12, 2^14 and 2^16 codes: table 1 of the paper, with 512 and 64 added.
LEVELS = {
    64: (8, 8),
    240: (8, 6, 5),
    512: (8, 8, 8),
    1000: (8, 5, 5, 5),
    4375: (7, 5, 5, 5, 5),
    15360: (8, 8, 8, 6, 5),
    64000: (8, 8, 8, 5, 5, 5),
}
_MARGIN = 1e-3  # by how much the bounded latents reach beyond the outermost levels


class FSQ(Quantizer):
    """Each of D channels is squeezed by tanh into its levels and rounded; the code is the mixed-radix number of all.

    Args:
        levels: number of levels L of each channel; K is their product, D their count.
        show_usage: keep the last 65,536 codes seen in training and report the share of the codebook in them.
    """

    mark = "levels"
    learned = False

    def __init__(self, levels: Sequence[int], show_usage: bool) -> None:
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ needs at least two levels in each channel, but got {list(levels)}.")
        super().__init__(math.prod(levels), len(levels), show_usage)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int64))
        self._register_usage()

    @property
    def place_values(self) -> Tensor:
        """(D,) int64: what one level of each channel is worth in the index; the first channel changes fastest."""
        return torch.cat([self.levels.new_ones(1), self.levels[:-1]]).cumprod(0)

    def assign(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        bounded = self._bound(latents)
        half = self.levels // 2
        steps = bounded.detach().round()  # from -half to levels - 1 - half
        indices = ((steps.long() + half) * self.place_values).sum(-1)
        zero = latents.new_zeros(())
        return straight_through(bounded, steps) / half, (zero, zero, zero), indices

    def codebook(self) -> Tensor:
        numbers = torch.arange(self.n_e, device=self.levels.device)[:, None]
        steps = numbers // self.place_values % self.levels
        half = self.levels // 2
        return (steps - half) / half

    def _bound(self, latents: Tensor) -> Tensor:
        """Squeeze each channel so that rounding gives exactly its levels, and 0 lies at 0."""
        reach = (self.levels - 1).to(latents.dtype) * (1 + _MARGIN) / 2
        offset = 0.5 * (1 - self.levels % 2).to(latents.dtype)  # an even number has no middle level
        shift = torch.atanh(offset / reach)
        return torch.tanh(latents + shift) * reach - offset

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored, errors = state_dict.get(f"{prefix}levels"), args[-1]
        if stored is not None and stored.tolist() != self.levels.tolist():
            errors.append(f"{prefix}levels are {stored.tolist()}, the model has {self.levels.tolist()}")
        super()._load_from_state_dict(state_dict, prefix, *args)
