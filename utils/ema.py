"""Exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.sharded import local


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float = 0.9999, refused: Tensor | None = None) -> None:
    """Move every parameter of `ema_model` to decay * itself + (1 - decay) * that of `model`, in place.

    Buffers are left as they are. Both models must have the same parameter names, and be sharded alike or not at all.
    `refused` (0-d float32, on their device) is 1 where the averages are to stay as they are, else 0.

    Raises:
        ValueError: when the parameter names differ.
    """
    source = dict(model.named_parameters())
    target = dict(ema_model.named_parameters())
    if source.keys() != target.keys():
        odd = sorted(source.keys() ^ target.keys())[0]
        raise ValueError(f"the EMA model and the model differ in their parameters, the first difference is {odd}")
    averages = [local(parameter.detach()) for parameter in target.values()]
    weights = [local(source[name].detach()) for name in target]
    if refused is not None:
        torch._foreach_lerp_(averages, weights, [(1 - decay) * (1 - refused)] * len(weights))
    elif averages[0].is_cuda:
        torch._foreach_lerp_(averages, weights, 1 - decay)  # one pass over the memory
    else:
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, weights, alpha=1 - decay)


def requires_grad(model: nn.Module, flag: bool = True) -> None:
    """Set whether the parameters of `model` get gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(flag)
