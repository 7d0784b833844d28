"""Classifier-free guidance: images are also predicted without condition, and the difference is amplified."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from autoregressive.models.gpt import Transformer


def uses_guidance(cfg_scale: float) -> bool:
    """Scales up to 1 mean conditional sampling."""
    return cfg_scale > 1.0


def guided_at(step: int, cfg_interval: float) -> bool:
    """Whether decode step `step` (0 draws the second token) is guided; -1 guides all, k the steps up to k."""
    return cfg_interval <= -1 or step <= cfg_interval


def with_null_condition(model: Transformer, cond: Tensor) -> Tensor:
    """[cond; null condition], (2B, ...). ValueError if the model has no null class."""
    return torch.cat([cond, model.cls_embedding.null_condition(cond)])


def guided_logits(logits: Tensor, cfg_scale: float) -> Tensor:
    """uncond + cfg_scale * (cond - uncond), from logits (2B, ...) of [cond; uncond]."""
    cond, uncond = logits.chunk(2)
    return uncond + cfg_scale * (cond - uncond)
