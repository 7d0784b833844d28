"""From logits to a token: temperature, top-k, top-p, min-p, draw.

Top-k: Fan et al. 2018 (arXiv:1805.04833). Top-p: Holtzman et al. 2020 (arXiv:1904.09751). Min-p: Nguyen et al.
2024 (arXiv:2407.01082).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autoregressive.models.noise import ImageNoise
from autoregressive.models.schedules import values

Generators = Sequence[torch.Generator] | ImageNoise


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int | None = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """A copy of `logits` (..., V) in which the tokens outside top-k, then outside top-p, are `filter_value`.

    `top_k` 0 or None and `top_p` 1 keep everything. Ties at the k-th place are all kept. Top-p keeps the best
    tokens up to and including the one that takes their probability over `top_p`, and never fewer than the
    best. With `min_tokens_to_keep` m > 1, top-p keeps m + 1 tokens: the established samplers do.
    """
    if top_k is not None and top_k > 0:
        count = min(max(top_k, min_tokens_to_keep), logits.shape[-1])
        smallest = logits.topk(count, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, filter_value)
    if top_p < 1.0:
        ranked, order = logits.sort(dim=-1, descending=True)
        before = ranked.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        drop = before > top_p
        drop[..., : 1 if min_tokens_to_keep <= 1 else min_tokens_to_keep + 1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), filter_value)
    return logits


def min_p_filtering(logits: Tensor, min_p: float, filter_value: float = -float("inf")) -> Tensor:
    """A copy of `logits` (..., V) in which tokens less likely than `min_p` times the likeliest are `filter_value`.

    0 keeps everything, 1 the likeliest alone (and its equals). ValueError outside 0 to 1.
    """
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p is a share of the likeliest token's probability, 0 to 1, not {min_p}")
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), filter_value)


def check_sampling(cfg_scale: float, top_k: int, top_p: float, *temperatures: float) -> None:
    """Whether these mean something; ValueError says which does not."""
    if not math.isfinite(cfg_scale):
        raise ValueError(f"a guidance scale is a finite number, not {cfg_scale}")
    for temperature in temperatures:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"a temperature is 0 (always the likeliest code) or more, not {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k is 0 (all codes) or more, not {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p is 0 to 1, not {top_p}")


def temperatures(
    count: int, start: float, end: float | None, schedule: str = "linear", power: float = 1.0
) -> list[float]:
    """The temperature of each of the `count` tokens of an image: `start` at the first, `end` at the last.

    `end` None is `start` throughout.
    """
    return values(count, start, start if end is None else end, schedule, power)


def logits_to_probs(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None, min_p: float = 0.0
) -> Tensor:
    """Probabilities (..., V) after temperature (at least 1e-5) and filtering by top-k, top-p, min-p in this order."""
    kept = top_k_top_p_filtering(logits / max(temperature, 1e-5), top_k=top_k, top_p=top_p)
    return min_p_filtering(kept, min_p).softmax(dim=-1)


def draw(probs: Tensor, generators: Generators | None = None) -> Tensor:
    """One token per row of `probs` (B, V): int64 (B, 1).

    Without `generators` this is one `torch.multinomial` from the global generator. With one generator per
    row, row i draws from its own alone, whatever the other rows are: token = argmax of p / e with e
    exponentially distributed, which is also what `torch.multinomial` does with that generator. They may live
    on another device than `probs`. `ImageNoise` gives e as a function of the image's seed and the position.
    """
    if generators is None:
        return torch.multinomial(probs, num_samples=1)
    if len(generators) != probs.shape[0]:
        raise ValueError(f"expected one generator per image, got {len(generators)} for {probs.shape[0]} images")
    if isinstance(generators, ImageNoise):
        return (probs / generators.exponential(probs.shape[-1]).to(probs.device)).argmax(dim=-1, keepdim=True)
    noise = [torch.empty_like(probs[0], device=g.device).exponential_(generator=g) for g in generators]
    return (probs / torch.stack(noise).to(probs.device)).argmax(dim=-1, keepdim=True)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    generators: Generators | None = None,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw from the last position of `logits` (B, S, V), or take its best token if not `sample_logits`.

    Returns tokens int64 (B, 1) and the probabilities (B, V) they were drawn from.
    """
    probs = logits_to_probs(logits[:, -1], temperature, top_p, top_k, min_p)
    return draw(probs, generators) if sample_logits else probs.argmax(dim=-1, keepdim=True), probs
