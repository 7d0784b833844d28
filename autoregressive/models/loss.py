"""The training loss without the logits: output layer and cross entropy, a few positions at a time.

Float32 logits of all positions, their log-softmax and their gradient are the largest tensors of a training step (V =
16,384). Here each piece's gradients are taken at once, while its logits are there, so that none of them is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # positions whose logits stand at the same time


def head_loss(h: Tensor, weight: Tensor, targets: Tensor, valid: Tensor | None = None, rows: int = ROWS) -> Tensor:
    """Mean cross entropy of ``h @ weight.T`` against `targets`, as the model's own loss with all logits gives it.

    Args:
        h: (B, N, dim), any float dtype; autocast decides in which the products are computed, logits are float32.
        weight: (V, dim), of the output layer.
        targets: (B, N) int64.
        valid: (B,), 1 or 0: which samples count; all without it.
        rows: positions at a time.
    """
    shares = torch.full_like(targets, 1 / targets.numel(), dtype=torch.float32)
    if valid is not None:
        count = (valid.sum() * targets.shape[1]).clamp(min=1)  # on the device: max() would wait for it
        shares = (valid[:, None] / count).float().expand_as(targets)
    return _HeadLoss.apply(h.flatten(0, 1), weight, targets.flatten(), shares.flatten(), rows)


class _HeadLoss(torch.autograd.Function):
    """Sum over positions of share x cross entropy; both gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, shares: Tensor, rows: int) -> Tensor:
        loss = shares.new_zeros(())
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_h = torch.empty_like(h) if wants_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        for start in range(0, len(h), rows):
            piece = slice(start, start + rows)
            product = F.linear(h[piece], weight)
            logits = product.float()
            normalizer = logits.logsumexp(dim=-1)
            own = logits.gather(1, targets[piece, None])[:, 0]
            loss = loss + ((normalizer - own) * shares[piece]).sum()
            if wants_gradient:
                slope = logits.sub_(normalizer[:, None]).exp_()  # probabilities, in the place of the logits
                slope.scatter_add_(1, targets[piece, None], slope.new_full((len(slope), 1), -1.0))
                low = slope.to(product.dtype)
                # the shares, which may be tiny, come in after the products in a short float format
                grad_h[piece] = F.linear(low, weight.t()).float().mul_(shares[piece, None]).to(h.dtype)
                weighted = h[piece].float() * (shares[piece, None] * shares.numel())
                grad_weight += F.linear(low.t(), weighted.t().to(low.dtype)).float()
        if wants_gradient:
            grad_weight /= shares.numel()
            ctx.save_for_backward(grad_h, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight = ctx.saved_tensors
        return (grad_h.float() * grad).to(grad_h.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None
