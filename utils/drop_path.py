"""Stochastic depth: in training, a residual branch is left out for some samples (Huang et al. 2016)."""

from __future__ import annotations

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
    """`drop_path` as a layer; the identity in evaluation mode."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, ...)."""
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def extra_repr(self) -> str:
        """The rate, for print(model)."""
        return f"drop_prob={self.drop_prob:.3f}"
