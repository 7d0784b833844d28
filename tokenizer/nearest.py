"""From vectors to codes and back: nearest-code search and codebook look-up, the same for every quantizer.

The search always runs in full float32. Under bfloat16 autocast about 6 % of random tokens would get another
code, and TF32 moves codes too, so one image would have different codes on different hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores held at a time: 128 MiB of float32, whatever the number of tokens.
_MAX_SCORES = 2**25
# In the search on a CPU 4 MiB, which stay in its cache: 7 times as fast (docs/tokenizer.md).
_CACHED_SCORES = 2**20
_BLOCK = 128  # codes in a block of the search


_EXACT = ("none", "ieee")  # what `fp32_precision` says of products in full float32


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Autocast off and matrix products in full float32 inside, on GPUs and CPUs alike, and both as before afterwards.

    It does not matter by which of PyTorch's switches the precision was chosen before.
    """
    restore = _exact_products()
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        restore()


def _exact_products() -> Callable[[], None]:
    """Leave reduced precision out of matrix products; returns what sets the switches back.

    PyTorch has an older switch, for GPU and CPU at once, and a newer one for each. Reading the older one raises
    RuntimeError where they contradict each other, and compiled code reads it, so in between all are of one mind.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    if all(precision in _EXACT for precision in before):
        return lambda: None
    older = _older_switch()
    torch.set_float32_matmul_precision("highest")

    def restore() -> None:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before):
            backend.fp32_precision = "none"  # it may have followed the switch of all backends, torch.backends'
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision

    return restore


def _older_switch() -> str:
    """The value of the older switch as far as it can be known: the newer ones may contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        pass
    try:
        return "high" if torch.backends.cuda.matmul.allow_tf32 else "highest"
    except RuntimeError:
        return "highest"


@contextmanager
def exact_arithmetic(device_type: str, tf32_convolutions: bool = False) -> Iterator[None]:
    """`full_float32`, and convolutions by algorithms that do not depend on timing, without TF32 unless asked for.

    What is encoded in here has the same codes whatever images share its batch, and on any GPU of a kind.
    """
    algorithms = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32_convolutions
    )
    with full_float32(device_type), algorithms:
        yield


def row_chunks(rows: int, columns: int) -> int:
    """How many rows of a (rows, columns) score matrix to hold at a time."""
    return max(1, min(rows, _MAX_SCORES // columns))


# An operator of its own: the compiler keeps it whole, so the precision switch and the loop break no graph.
@torch.library.custom_op("llamagen::nearest_codes", mutates_args=())
def nearest_codes(vectors: Tensor, codebook: Tensor, unit_length: bool) -> Tensor:
    """Index of the nearest code of every vector.

    Args:
        vectors: (N, D) float.
        codebook: (K, D) float.
        unit_length: vectors and codes all have length one, so the largest product is the nearest code.

    Returns:
        (N,) int64 in [0, K). No gradient passes.
    """
    vectors, codebook = at_least_float32(vectors), at_least_float32(codebook)
    nearest = vectors.new_empty(len(vectors), dtype=torch.int64)
    limit = _CACHED_SCORES if vectors.device.type == "cpu" else _MAX_SCORES
    rows = max(1, min(len(vectors), limit // len(codebook)))
    buffer = vectors.new_empty(rows, len(codebook))
    columns, half_squares = codebook.T.contiguous(), codebook.square().sum(1) / 2
    with full_float32(vectors.device.type):
        for first in range(0, len(vectors), rows):
            chunk = vectors[first : first + rows]
            scores = torch.mm(chunk, columns, out=buffer[: len(chunk)])
            if not unit_length:  # argmin |z - e|^2 = argmax z.e - |e|^2 / 2
                scores -= half_squares
            nearest[first : first + rows] = _first_largest(scores)
    return nearest


def _first_largest(scores: Tensor) -> Tensor:
    """``scores.argmax(1)`` of (N, K). On a CPU the largest block first: `amax` is vectorised there, `argmax` not."""
    count, width = scores.shape
    if scores.device.type != "cpu" or width % _BLOCK:
        return scores.argmax(1)
    blocks = scores.view(count, width // _BLOCK, _BLOCK)
    block = blocks.amax(2).argmax(1)
    inside = blocks.gather(1, block.view(count, 1, 1).expand(count, 1, _BLOCK)).squeeze(1)
    return block * _BLOCK + inside.argmax(1)


@nearest_codes.register_fake
def _(vectors: Tensor, codebook: Tensor, unit_length: bool) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lookup(indices: Tensor, codebook: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True) -> Tensor:
    """Rows of the codebook, laid out as a feature map.

    Args:
        indices: int32 or int64 in [0, K), any shape with as many entries as `shape` has positions.
        codebook: (K, D).
        shape: (B, D, H, W), or (B, H, W, D) with `channel_first` off. None gives ``indices.shape + (D,)``.

    Raises:
        IndexError: an index is negative or not below K. A GPU stops by the look-up's own assertion in its place.
        ValueError: `shape` does not fit the indices or the codebook.
    """
    _check_indices(indices, len(codebook))
    if shape is None:
        return F.embedding(indices, codebook)
    if len(shape) != 4:
        raise ValueError(f"shape must have four sizes, but is {tuple(shape)}.")
    batch, *grid = (shape[0], shape[2], shape[3]) if channel_first else shape[:3]
    channels = shape[1] if channel_first else shape[3]
    expected = batch * grid[0] * grid[1]
    if channels != codebook.shape[1] or indices.numel() != expected:
        raise ValueError(
            f"shape {tuple(shape)} asks for {expected} codes of {channels} channels, but there are "
            f"{indices.numel()} indices into a codebook of {codebook.shape[1]} channels."
        )
    codes = F.embedding(indices.reshape(batch, *grid), codebook)
    return codes.permute(0, 3, 1, 2).contiguous() if channel_first else codes


def _check_indices(indices: Tensor, codebook_size: int) -> None:
    # Reading the limits back would make the host wait for a GPU, whose look-up asserts the same; "meta" has no values.
    if torch.compiler.is_compiling() or indices.device.type in ("cuda", "meta") or not indices.numel():
        return
    low, high = (int(limit) for limit in indices.aminmax())
    if low < 0 or high >= codebook_size:
        raise IndexError(f"codes must lie in [0, {codebook_size}), but reach from {low} to {high}.")
