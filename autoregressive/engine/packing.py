"""Weights, keys and values in the order in which the C++ step reads them: vectors of sixteen 32-bit words.

A word holds 1 float32, 2 bfloat16 or 4 int8 that follow each other along the axis that is summed over.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16
PER_WORD = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least `n`."""
    return -(-n // multiple) * multiple


class Matrix(ctypes.Structure):
    """`struct Matrix` of decode_step.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("words", ctypes.c_int64),
    ]


@dataclass
class Packed:
    """A weight matrix (outputs, inputs) as the C++ step reads it; `scale` and `offset` are there for int8 alone."""

    data: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None

    def structure(self) -> Matrix:
        """Addresses of the tensors, valid as long as they live."""
        scale, offset = (None if t is None else t.data_ptr() for t in (self.scale, self.offset))
        return Matrix(self.data.data_ptr(), scale, offset, self.data.shape[0], self.data.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (self.data, self.scale, self.offset) if t is not None)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (..., n) as int8 and a float32 scale (...) for each row: x = int8 * scale, symmetric, no zero scale."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1).clamp(min=1e-12) / 127
    return (wide / scale[..., None]).round().to(torch.int8), scale


def pack_matrix(weight: Tensor, dtype: torch.dtype) -> Packed:
    """`weight` (outputs, inputs), outputs padded to a multiple of 32, inputs to whole words, with zeros."""
    per, scale = PER_WORD[dtype], None
    if dtype == torch.int8:
        weight, scale = quantize_rows(weight)
    outputs, inputs = weight.shape
    weight = F.pad(weight.to(dtype), (0, -inputs % per, 0, -outputs % (2 * LANES)))
    data = weight.unflatten(0, (-1, LANES)).unflatten(2, (-1, per)).transpose(1, 2).contiguous()
    if scale is None:
        return Packed(data)
    scale = F.pad(scale, (0, -outputs % (2 * LANES)))
    return Packed(data, scale.contiguous(), weight.sum(dim=1, dtype=torch.int32).float() * 128)


def interleave(first: Packed, second: Packed) -> Packed:
    """One matrix whose blocks of 16 outputs are of `first` and of `second` in turn."""

    def weave(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.stack([a, b], dim=1).flatten(0, 1).contiguous()

    def blocks(scale: Tensor | None) -> Tensor | None:
        return None if scale is None else scale.view(-1, LANES)

    data = weave(first.data, second.data)
    assert data is not None
    return Packed(
        data,
        weave(blocks(first.scale), blocks(second.scale)),
        weave(blocks(first.offset), blocks(second.offset)),
    )


def pack_keys(keys: Tensor) -> Tensor:
    """(..., P, d) to int32 (..., ceil(P / 16), words of d, 16): sixteen positions beside each other."""
    keys = F.pad(keys, (0, 0, 0, -keys.shape[-2] % LANES)).unflatten(-2, (-1, LANES))
    words = keys.unflatten(-1, (-1, PER_WORD[keys.dtype])).transpose(-3, -2)
    return words.contiguous().view(torch.int32).squeeze(-1)


def pack_values(values: Tensor) -> Tensor:
    """(..., P, d) to int32 (..., words of P, ceil(d / 16), 16): sixteen channels beside each other."""
    per = PER_WORD[values.dtype]
    values = F.pad(values, (0, -values.shape[-1] % LANES, 0, -values.shape[-2] % per))
    words = values.unflatten(-2, (-1, per)).unflatten(-1, (-1, LANES)).movedim(-3, -1)
    return words.contiguous().view(torch.int32).squeeze(-1)
