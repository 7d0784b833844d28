"""Keys and values of earlier positions, kept while an image is being generated."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autoregressive.models.config import ModelArgs, find_multiple
from autoregressive.models.text_condition import text_attention_mask

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # formats of caches with a scale for each vector
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_vectors(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors (..., width) in one of the formats `EIGHT_BITS`, and their scales float32 (...): x = values * scale.

    Symmetric: the scale is the largest magnitude of a vector over the largest number of the format.
    """
    wide = x.float()
    largest = wide.abs().amax(dim=-1).clamp(min=1e-12)
    values = wide * (torch.full_like(largest, LARGEST[dtype]) / largest)[..., None]  # a number / tensor rounds twice
    return (values.round() if dtype == torch.int8 else values).to(dtype), largest * (1 / LARGEST[dtype])


def dequantize_vectors(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale in the format `dtype`, (..., width): the inverse of `quantize_vectors` up to its rounding."""
    return (values.float() * scale[..., None]).to(dtype)


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
        shape = (max_batch_size, n_head, max_seq_length, find_multiple(head_dim, 16 if dtype.itemsize == 1 else 8))
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype, device=device)[..., :head_dim])
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype, device=device)[..., :head_dim])
        self.length: int | None = max_seq_length

    @property
    def scales(self) -> dict[str, Tensor]:
        """The tensors `k_scale` and `v_scale` of `QuantizedKVCache`; other caches have none."""
        return {name: buffer for name, buffer in self.named_buffers() if name in ("k_scale", "v_scale")}

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


class QuantizedKVCache(KVCache):
    """Keys and values in 8 bits, with one scale for each vector: `k_scale`, `v_scale` float32 (rows, heads, positions).

    What fills the cache first, a condition, attends to itself as it was computed; everything later to what is stored.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_seq_length: int,
        n_head: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(max_batch_size, max_seq_length, n_head, head_dim, dtype, device)
        for name in ("k_scale", "v_scale"):
            self.register_buffer(name, torch.zeros(self.k_cache.shape[:3], device=device))

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.update`; what it returns is in the format of `k_val` and `v_val`."""
        rows, length = k_val.shape[0], self.length
        stored = []
        for cache, scales, new in ((self.k_cache, self.k_scale, k_val), (self.v_cache, self.v_scale, v_val)):
            values, scale = quantize_vectors(new, cache.dtype)
            # as bytes, since not every device copies float8 by index
            cache[:rows].view(torch.uint8).index_copy_(2, input_pos, values.view(torch.uint8))
            scales[:rows].index_copy_(2, input_pos, scale)
            stored.append((cache[:rows, :, :length], scales[:rows, :, :length], new.dtype))
        if length == k_val.shape[2]:
            return k_val, v_val
        keys, values = (dequantize_vectors(*vectors) for vectors in stored)
        return keys, values


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
        """Empty caches of exactly this size: 2 * n_layer * rows * positions * kv_heads * head_dim numbers.

        `dtype` is a floating format, or one of `EIGHT_BITS`, which adds a float32 scale for each head_dim numbers.
        """
        shape = (rows, positions, config.kv_heads, config.head_dim)
        layer = QuantizedKVCache if dtype in LARGEST else KVCache
        return cls([layer(*shape, dtype, device) for _ in range(config.n_layer)], key_mask)

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
