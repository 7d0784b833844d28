"""Classifier-free guidance: images are also predicted without condition, and the difference is amplified.

Ho and Salimans 2022 (arXiv:2207.12598). How strongly may change over the image: `guidance_scales`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autoregressive.models.schedules import values

if TYPE_CHECKING:
    from autoregressive.models.gpt import Transformer


def uses_guidance(cfg_scale: float) -> bool:
    """Scales up to 1 mean conditional sampling."""
    return cfg_scale > 1.0


def guided_at(step: int, cfg_interval: float) -> bool:
    """Whether decode step `step` (0 draws the second token) is guided; -1 guides all, k the steps up to k.

    The first token, step -1, is always guided.
    """
    return step < 0 or cfg_interval <= -1 or step <= cfg_interval


def guidance_scales(
    count: int,
    cfg_scale: float,
    cfg_interval: float = -1,
    schedule: str = "constant",
    power: float = 1.0,
    start: int = 0,
) -> list[float]:
    """The guidance scale of each of the `count` tokens of an image; 1 is none.

    `schedule` (constant, linear, cosine, power-cosine) grows from 1 at the first token to `cfg_scale` at the
    last. Outside the interval, that is before token `start` and after decode step `cfg_interval` (token
    `cfg_interval` + 1; -1: no end), there is no guidance (Kynkaanniemi et al. 2024, arXiv:2404.07724). The
    established samplers have the constant schedule from token 0. ValueError for a negative start.
    """
    if start < 0:
        raise ValueError(f"the first guided token is 0 or later, not {start}")
    scales = values(count, 1.0, cfg_scale if uses_guidance(cfg_scale) else 1.0, schedule, power)
    return [scale if i >= start and guided_at(i - 1, cfg_interval) else 1.0 for i, scale in enumerate(scales)]


def null_rows_needed(scales: Sequence[float]) -> int:
    """For how many tokens, from the first on, the unconditional half must be computed: up to the last guided one.

    Unguided tokens before it count too, as their keys and values are looked back at.
    """
    return max((i + 1 for i, scale in enumerate(scales) if uses_guidance(scale)), default=0)


def with_null_condition(model: Transformer, cond: Tensor) -> Tensor:
    """[cond; null condition], (2B, ...). ValueError if the model has no null class."""
    return torch.cat([cond, model.cls_embedding.null_condition(cond)])


def guided_logits(logits: Tensor, cfg_scale: float) -> Tensor:
    """uncond + cfg_scale * (cond - uncond), from logits (2B, ...) of [cond; uncond]; at scale 1 exactly cond."""
    cond, uncond = logits.chunk(2)
    if cfg_scale == 1:
        return cond
    return uncond + cfg_scale * (cond - uncond)
