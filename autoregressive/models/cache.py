"""Keys and values of earlier positions, kept while an image is being generated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoregressive.models.config import ModelArgs
from autoregressive.models.text_condition import text_attention_mask


class KVCache(nn.Module):
    """Rotated keys and values of one block: `k_cache`, `v_cache` (rows, heads, positions, head_dim)."""

    def __init__(
        self,
        max_batch_size: int,
        max_seq_length: int,
        n_head: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        shape = (max_batch_size, n_head, max_seq_length, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype, device=device))
        self.length = max_seq_length

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, heads, S, head_dim) of positions `input_pos` (S,) in the first B rows.

        Returns views of the keys and values of these rows: the first `self.length` positions, which are all
        of them unless the owner has set fewer.
        """
        rows = k_val.shape[0]
        k_cache, v_cache = self.k_cache[:rows], self.v_cache[:rows]
        k_cache.index_copy_(2, input_pos, k_val.to(k_cache.dtype))
        v_cache.index_copy_(2, input_pos, v_val.to(v_cache.dtype))
        return k_cache[:, :, : self.length], v_cache[:, :, : self.length]


class DecodeCache:
    """The caches of all blocks for one generation.

    It belongs to whoever generates and is handed to `Transformer.forward`, so the model itself keeps no trace
    of it. `length` counts the positions filled so far; attention reads these and no others. `key_mask` (rows,
    positions) is False where a caption is padded; None means that nothing is.
    """

    def __init__(self, layers: list[KVCache], key_mask: Tensor | None = None) -> None:
        self.layers = layers
        self.key_mask = key_mask
        self.length = 0

    @classmethod
    def allocate(
        cls,
        config: ModelArgs,
        rows: int,
        positions: int,
        dtype: torch.dtype,
        device: torch.device,
        key_mask: Tensor | None = None,
    ) -> DecodeCache:
        """Empty caches of exactly this size: 2 * n_layer * rows * positions * kv_heads * head_dim numbers."""
        shape = (rows, positions, config.kv_heads, config.head_dim)
        return cls([KVCache(*shape, dtype, device) for _ in range(config.n_layer)], key_mask)

    def fits(self, rows: int, positions: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `rows` sequences of `positions` find room in these caches, in this format and on this device."""
        keys = self.layers[0].k_cache
        return (keys.dtype, keys.device) == (dtype, device) and keys.shape[0] >= rows and keys.shape[2] >= positions

    def extend(self, rows: int, count: int) -> Tensor | None:
        """Take `count` more positions in; returns the mask (rows, 1, count, length) their queries need.

        None means that the usual rule suffices: causal for several positions, everything for a single one.
        ValueError if the caches are full.
        """
        start, self.length = self.length, self.length + count
        positions = self.layers[0].k_cache.shape[2]
        if self.length > positions:
            raise ValueError(f"the cache has {positions} positions, too few for {self.length}")
        for layer in self.layers:
            layer.length = self.length
        if self.key_mask is None and (start == 0 or count == 1):
            return None
        if self.key_mask is None:
            visible = torch.ones(1, self.length, dtype=torch.bool, device=self.layers[0].k_cache.device)
        else:
            visible = self.key_mask[:rows, : self.length]
        return text_attention_mask(visible, first_query=start)
