"""Cross entropy and its gradient of rows of logits, in two passes over them, by a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits of a row that are read at a time


def cross_entropy_in_place(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """The cross entropy of each row in nats: float32 (N,). All arithmetic is float32.

    Args:
        logits: (N, V), float32, bfloat16 or float16, rows contiguous. With `with_gradient` overwritten by the gradient
            of each row's cross entropy with respect to it: softmax minus one at the target.
        targets: (N,) int64 in [0, V).
        with_gradient: whether the gradient is wanted.

    Raises:
        ValueError: when the shapes do not fit or the rows are not contiguous.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or logits.stride(1) != 1:
        raise ValueError(
            f"logits {tuple(logits.shape)} of strides {logits.stride()} and targets {tuple(targets.shape)} do not fit"
        )
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(logits.shape[1]))
    options = {"WITH_GRADIENT": with_gradient, "BLOCK": block, "num_warps": 8}
    _cross_entropy[(len(logits),)](logits, targets.contiguous(), losses, logits.shape[1], logits.stride(0), **options)
    return losses


@triton.jit
def _cross_entropy(logits, targets, losses, columns, stride, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One row: the running maximum and sum of exponentials in the first pass, the gradient in the second."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK)
    highest, total, own = -float("inf"), 0.0, 0.0
    for start in range(0, columns, BLOCK):
        column = start + lane
        x = tl.load(logits + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above), axis=0)
        highest = above
        # summed, not loaded: another warp may be at the second pass and have overwritten it
        own += tl.sum(tl.where(column == target, x, 0.0), axis=0)
    normalizer = highest + tl.log(total)
    tl.store(losses + row, normalizer - own)
    if WITH_GRADIENT:
        for start in range(0, columns, BLOCK):
            column = start + lane
            x = tl.load(logits + column, mask=column < columns, other=-float("inf")).to(tl.float32)
            slope = tl.exp(x - normalizer) - (column == target).to(tl.float32)
            tl.store(logits + column, slope.to(logits.dtype.element_ty), mask=column < columns)
