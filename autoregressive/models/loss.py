"""The training loss without the logits: output layer and cross entropy, a few positions at a time.

Float32 logits of all positions, their log-softmax and their gradient are the largest tensors of a training step (V =
16,384). Here each piece's gradients are taken at once, while its logits are there, so that none of them is kept.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # positions whose logits stand at the same time, on a CPU
_GPU_ROWS, _GPU_BYTES = 8192, 600_000_000  # the same on a GPU, and the most that their float32 logits may take
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def head_loss(h: Tensor, weight: Tensor, targets: Tensor, valid: Tensor | None = None, rows: int = 0) -> Tensor:
    """Mean cross entropy of ``h @ weight.T`` against `targets`, as the model's own loss with all logits gives it.

    Args:
        h: (B, N, dim), any float dtype; autocast decides in which the products are computed, logits are float32.
        weight: (V, dim), of the output layer.
        targets: (B, N) int64.
        valid: (B,), 1 or 0: which samples count; all without it.
        rows: positions at a time; 0: what suits the device (`piece_rows`).
    """
    shares = torch.full_like(targets, 1 / targets.numel(), dtype=torch.float32)
    if valid is not None:
        count = (valid.sum() * targets.shape[1]).clamp(min=1)  # on the device: max() would wait for it
        shares = (valid[:, None] / count).float().expand_as(targets)
    rows = rows or piece_rows(h.device, len(weight))
    return _HeadLoss.apply(h.flatten(0, 1), weight, targets.flatten(), shares.flatten(), rows)


def piece_rows(device: torch.device, vocabulary: int) -> int:
    """How many positions are computed at a time: on a GPU more, for few large products, as the vocabulary allows."""
    if device.type != "cuda":
        return ROWS
    return max(min(_GPU_ROWS, _GPU_BYTES // (4 * vocabulary)) // 128 * 128, 128)


class _HeadLoss(torch.autograd.Function):
    """Sum over positions of share x cross entropy; both gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, shares: Tensor, rows: int) -> Tensor:
        loss = shares.new_zeros(())
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_h = torch.empty_like(h) if wants_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        cast = weight.to(_product_dtype(h))  # once: autocast would cast it for each piece and product
        for start in range(0, len(h), rows):
            piece = slice(start, start + rows)
            losses, slope = _cross_entropy(F.linear(h[piece].to(cast.dtype), cast), targets[piece], wants_gradient)
            loss = loss + (losses * shares[piece]).sum()
            if wants_gradient:
                # the shares, which may be tiny, come in after the products in a short float format
                grad_h[piece] = F.linear(slope, cast.t()).float().mul_(shares[piece, None]).to(h.dtype)
                weighted = h[piece].float() * (shares[piece, None] * shares.numel())
                grad_weight += F.linear(slope.t(), weighted.t().to(slope.dtype))
        if wants_gradient:
            grad_weight /= shares.numel()
            ctx.save_for_backward(grad_h, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight = ctx.saved_tensors
        return (grad_h.float() * grad).to(grad_h.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


def _product_dtype(h: Tensor) -> torch.dtype:
    """The dtype in which products with `h` are computed: autocast's, where it is on."""
    kind = h.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype


def _cross_entropy(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row, float32 (N,), and its gradient with respect to `logits`, in their dtype.

    `logits` (N, V) may be overwritten. The gradient is computed only if it is wanted.
    """
    if logits.is_cuda and _HAS_TRITON:
        from autoregressive.models.loss_kernel import cross_entropy_in_place

        return cross_entropy_in_place(logits, targets, wants_gradient), logits
    exact = logits.float()
    normalizer = exact.logsumexp(dim=-1)
    losses = normalizer - exact.gather(1, targets[:, None])[:, 0]
    if not wants_gradient:
        return losses, logits
    slope = exact.sub_(normalizer[:, None]).exp_()  # probabilities, in the place of the logits
    slope.scatter_add_(1, targets[:, None], slope.new_full((len(slope), 1), -1.0))
    return losses, slope.to(logits.dtype)
