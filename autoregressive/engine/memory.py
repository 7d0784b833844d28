"""Memory in large pages: weights and caches are read from end to end in every step, which is hard on small pages."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

_PAGE = 2**21
_CHUNK = 2**26
_MADV_HUGEPAGE = 14


class Arena:
    """Hands out tensors from chunks of 64 MiB, for which Linux is asked to use pages of 2 MiB."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, nbytes: int) -> Tensor:
        """Uninitialised bytes at a multiple of 64."""
        nbytes = -(-nbytes // 64) * 64
        if nbytes > len(self._chunk):
            self._chunk = _large_pages(max(nbytes, _CHUNK))
        taken, self._chunk = self._chunk[:nbytes], self._chunk[nbytes:]
        return taken

    def store(self, values: Tensor) -> Tensor:
        """A copy of contiguous `values`."""
        copy = self.empty(values.nbytes)[: values.nbytes].view(values.dtype).view(values.shape)
        return copy.copy_(values)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """int32 zeros."""
        count = torch.Size(shape).numel()
        return self.empty(4 * count)[: 4 * count].view(torch.int32).view(shape).zero_()


def _large_pages(nbytes: int) -> Tensor:
    """Bytes at the beginning of a large page, not touched yet."""
    block = torch.empty(nbytes + _PAGE, dtype=torch.uint8)
    block = block[-block.data_ptr() % _PAGE :][:nbytes]
    if sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise  # a refusal changes nothing but the speed
        madvise(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(nbytes // _PAGE * _PAGE), _MADV_HUGEPAGE)
    return block
