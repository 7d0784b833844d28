"""Losses of the game between tokenizer and discriminator, on raw discriminator outputs of any shape."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Discriminator: pushes real outputs above 1 and fake ones below -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Discriminator: mean of the cross-entropies of real against 1 and fake against 0."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def non_saturating_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Discriminator's side of the non-saturating game: the same as `vanilla_d_loss`."""
    return vanilla_d_loss(logits_real, logits_fake)


def hinge_gen_loss(logit_fake: Tensor) -> Tensor:
    """Generator: raises the discriminator's output without limit."""
    return -logit_fake.mean()


def non_saturating_gen_loss(logit_fake: Tensor) -> Tensor:
    """Generator: cross-entropy of fake against 1, whose gradient stays alive where the discriminator wins."""
    return F.softplus(-logit_fake).mean()


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """`weight` from step `threshold` on, `value` before."""
    return value if global_step < threshold else weight
