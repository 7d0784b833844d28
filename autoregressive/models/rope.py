"""Rotary position embedding over the two-dimensional token grid.

A token at row r and column c turns its channel pairs by the angles [r*f_0, ..., r*f_last, c*f_0, ...,
c*f_last]: the first half of the pairs tells the row, the second half the column. The positions of the
condition have all-zero table rows, so their queries and keys vanish: every condition token is attended to
with score 0. Checkpoints depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _frequencies(pairs: int, base: float, device: torch.device | str | None) -> Tensor:
    """f_j = base^(-j/pairs) for j < pairs, float32."""
    exponents = torch.arange(0, 2 * pairs, 2, device=device).float() / (2 * pairs)
    return 1.0 / (base**exponents)


def _cos_sin_rows(angles: Tensor, cls_token_num: int) -> Tensor:
    """(cos, sin) of angles (n, pairs) below `cls_token_num` rows of zeros: (cls_token_num + n, pairs, 2)."""
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([table.new_zeros(cls_token_num, *table.shape[1:]), table])


def precompute_freqs_cis(
    seq_len: int,
    n_elem: int,
    base: float = 10000,
    cls_token_num: int = 120,
    device: torch.device | str | None = None,
) -> Tensor:
    """The one-dimensional table: float32 (cls_token_num + seq_len, n_elem / 2, 2) of (cos, sin)."""
    positions = torch.arange(seq_len, device=device).float()
    return _cos_sin_rows(torch.outer(positions, _frequencies(n_elem // 2, base, device)), cls_token_num)


def precompute_freqs_cis_2d(
    grid_size: int,
    n_elem: int,
    base: float = 10000,
    cls_token_num: int = 120,
    device: torch.device | str | None = None,
) -> Tensor:
    """The table of the model for heads of width `n_elem`: float32 (cls_token_num + grid_size^2, n_elem / 2,
    2).

    The last axis is (cos, sin); the grid is in raster order. ValueError unless `n_elem` is a multiple of 4.
    """
    if n_elem % 4:
        raise ValueError(f"the 2-D rotary embedding needs a head width that is a multiple of 4, not {n_elem}")
    coordinates = torch.arange(grid_size, device=device).float()
    angles = torch.outer(coordinates, _frequencies(n_elem // 4, base, device))
    rows = angles[:, None].expand(grid_size, grid_size, -1)
    columns = angles[None, :].expand(grid_size, grid_size, -1)
    return _cos_sin_rows(torch.cat([rows, columns], dim=-1).flatten(0, 1), cls_token_num)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of `x` (B, S, heads, head_dim) by `freqs_cis` (S, head_dim / 2, 2).

    Computed in float32; the result has the dtype of `x`.
    """
    cos, sin = freqs_cis[:, None, :, :, None].unbind(-2)
    signs = torch.arange(-1, 2, 2, device=x.device)  # of an even channel, and of an odd one
    pairs = x.float().unflatten(-1, (-1, 2))
    # flipped pairs, not even and odd channels by themselves: compiled, either direction is one kernel without masks
    return (pairs * cos + pairs.flip(-1) * (sin * signs)).flatten(-2).type_as(x)


class RotaryTable:
    """The table of one model, on the device where it is asked for.

    It is no module and no buffer: it stays out of the state dict, stays float32 when the model is cast, and a
    model that was made on the meta device finds it on the device of its weights.
    """

    def __init__(self, grid_size: int, head_dim: int, base: float, cls_token_num: int) -> None:
        self._shape = (grid_size, head_dim, base, cls_token_num)
        self._table: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """float32 (cls_token_num + grid_size^2, head_dim / 2, 2) on `device`."""
        if self._table is None or self._table.device != device:
            with torch.inference_mode(False):  # training must be able to use a table made while sampling
                self._table = precompute_freqs_cis_2d(*self._shape, device=device)
        return self._table
