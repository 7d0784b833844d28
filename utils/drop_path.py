"""Stochastic depth: in training, a residual branch is left out for some samples (Huang et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """Zero whole samples of `x` (B, ...) with probability `drop_prob`, if `training`.

    `scale_by_keep` divides the kept samples by 1 - drop_prob, so that the expected value stays the same.
    """
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep_prob)
    if scale_by_keep and keep_prob > 0:
        kept /= keep_prob
    return x * kept


class DropPath(nn.Module):
    """`drop_path` as a layer; the identity in evaluation mode.

    The rate is there twice: as the number `drop_prob`, and as 1 - rate in the tensor `keep_prob`, which is no part of
    the state. Compiled code reads the tensor, so that layers of different rates share it; a number would be a constant
    of the code, and each rate would be compiled anew. It draws the same distribution from other random numbers.
    """

    keep_prob: Tensor

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep
        self.register_buffer("keep_prob", torch.tensor(1 - drop_prob), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DropPath:
        """Move the layer; a tensor that is new there (`to_empty`) or in a shorter format gets its value again."""
        super()._apply(fn, recurse)
        self.keep_prob = torch.tensor(1 - self.drop_prob, device=self.keep_prob.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, ...)."""
        if torch.compiler.is_compiling() and self.training:
            return x * self._kept_samples(x)
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def _kept_samples(self, x: Tensor) -> Tensor:
        """What each sample of `x` (B, ...) is multiplied by: (B, 1, ...), in its dtype."""
        kept = (torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < self.keep_prob).float()
        if self.scale_by_keep:
            kept = kept / self.keep_prob.clamp(min=1e-6)  # where the rate is 1, nothing is kept anyway
        return kept.to(x.dtype)

    def extra_repr(self) -> str:
        """The rate, for print(model)."""
        return f"drop_prob={self.drop_prob:.3f}"
