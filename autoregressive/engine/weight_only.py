"""Copies of a model for an engine: sharing its weights, or with matrices held as int8."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.engine.packing import quantize_rows
from autoregressive.models.gpt import Transformer


class Int8Linear(nn.Module):
    """A linear layer without bias whose weights are int8 with a scale per output; activations keep their format.

    Compiled, the conversion is part of the product, which then reads half the bytes of bfloat16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


def sharing_copy(model: Transformer) -> Transformer:
    """A model with the same parameters, the tensors themselves, but modules of its own, free to be changed."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def int8_copy(model: Transformer) -> Transformer:
    """The same with every matrix of the blocks, and the output layer, as `Int8Linear`."""
    own = sharing_copy(model)
    for parent in [*own.layers.modules(), own]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return own
