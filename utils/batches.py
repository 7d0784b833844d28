"""Work in batches that shrink when the memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from utils.distributed import get_rank

Item = TypeVar("Item")
Result = TypeVar("Result")

# What torch's CPU allocator and the GPU libraries say; only the GPU allocator has an exception class of its own.
_PHRASES = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def in_batches(
    work: Callable[[list[Item]], Result], batches: Iterable[Sequence[Item]]
) -> Iterator[tuple[list[Item], Result]]:
    """Yield each batch with ``work(batch)``; where the memory does not suffice, halves of it, from there on.

    Raises:
        ValueError: when the memory does not suffice for a single item.
    """
    limit = None
    for batch in batches:
        first = 0
        while first < len(batch):
            part = list(batch[first : first + limit] if limit else batch[first:])
            result = _unless_out_of_memory(work, part)
            if result is None:  # the failed tensors are gone here, with the frame that made them
                limit = len(part) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                print(f"rank {get_rank()}: out of memory at a batch of {len(part)}, goes on with {limit}", flush=True)
                continue
            yield part, result
            first += len(part)


def _unless_out_of_memory(work: Callable[[list[Item]], Result], items: list[Item]) -> Result | None:
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"the memory does not suffice for a batch of one: {reason}") from error
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU or the machine had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
