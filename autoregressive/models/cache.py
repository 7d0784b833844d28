"""Keys and values of earlier positions, kept while an image is being generated."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autoregressive.models.config import ModelArgs, find_multiple
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
        # rows of whole 16-byte words, also for heads of 100 numbers: a GPU reads them in one piece
        shape = (max_batch_size, n_head, max_seq_length, find_multiple(head_dim, 8))
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype, device=device)[..., :head_dim])
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype, device=device)[..., :head_dim])
        self.length: int | None = max_seq_length

    def first(self, rows: int, positions: int) -> KVCache:
        """The first `rows` and `positions` as a cache of its own, read whole; they share memory.

        Compiled code must be given exactly what it writes: a slice taken inside it would be copied, written and copied
        back in whole.
        """
        part = copy.copy(self)
        part._buffers = {name: buffer[:rows, :, :positions] for name, buffer in self._buffers.items()}
        part.length = None
        return part

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, heads, S, head_dim) of positions `input_pos` (S,) in the first B rows.

        Returns views of the keys and values of these rows: the first `self.length` positions, which are all
        of them unless the owner has set fewer (None: all, without a slice).
        """
        rows = k_val.shape[0]
        k_cache, v_cache = self.k_cache, self.v_cache
        if rows != k_cache.shape[0]:
            k_cache, v_cache = k_cache[:rows], v_cache[:rows]
        k_cache.index_copy_(2, input_pos, k_val.to(k_cache.dtype))
        v_cache.index_copy_(2, input_pos, v_val.to(v_cache.dtype))
        if self.length is None:
            return k_cache, v_cache
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

    def fixed(self, rows: int, positions: int) -> FixedCache:
        """The first `rows` and `positions` for steps that bring positions and mask themselves."""
        return FixedCache([layer.first(rows, positions) for layer in self.layers])

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


class FixedCache(DecodeCache):
    """Caches whose filled length is known to tensors alone: positions and mask come with every call."""

    def extend(self, rows: int, count: int) -> None:
        """Nothing to do: nothing is counted here."""
