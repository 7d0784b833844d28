"""The end of a decode step in one kernel, one program per image: guidance, filtering, noise, the token, its place.

The rules are those of `models.guidance`, `models.sampling` and `models.noise`; everything that changes from step to
step is read from tensors, so the launch can be captured in a CUDA graph and replayed. Nothing is sorted: a filter
keeps the logits above a threshold, and the threshold is found by bisection on the bits of the logits, which is exact.

Three things may differ from the plain functions. A GPU's fast exponential is off by up to about 2e-6 of its value, so
the token may be another where the best two scores are that close. Top-p adds up probabilities in another order, so a
token whose cumulated probability is within rounding (about 1e-6) of `top_p` may fall on the other side. And top-p
keeps or drops equal logits together, where a sort keeps some of them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregressive.engine.kernels.launch import dependent_launch, wait_for_inputs

_LOGIT_TYPES = torch.float32, torch.bfloat16, torch.float16


@triton.jit
def _key(value):
    """Float32 numbers as int32 in the same order; -0 comes just before 0."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 number with this key."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _threshold(x, weight, low, high, limit, enough):
    """The key above which the `x` lie whose strictly larger ones weigh at most `limit` together.

    `low` is a key below all such x, `high` the key of the largest. The sum of a subset never exceeds that of a
    larger set, even as rounded, so bisection is sound. It ends early where the x above the key weigh `enough`.
    """
    undecided = high > low + 1
    while undecided:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean; their sum may not fit
        mass = tl.sum(tl.where(x > _value(middle), weight, 0.0), axis=0)
        low = tl.where(mass > limit, middle, low)
        high = tl.where(mass > limit, high, middle)
        undecided = (high > low + 1) & (mass != enough)
    return low


@triton.jit
def philox_words(seed, position, BLOCK: tl.constexpr):
    """The Philox 4x32-10 words uint32 (BLOCK,) of tokens 0 to BLOCK - 1; `seed` and `position` are int64 scalars."""
    c0 = tl.arange(0, BLOCK // 4).to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = c2 + seed.to(tl.uint32)
    k1 = c2 + (seed >> 32).to(tl.uint32)
    m0 = tl.full((BLOCK // 4,), 0xD2511F53, tl.uint32)
    m1 = tl.full((BLOCK // 4,), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        next0 = tl.umulhi(m1, c2) ^ c1 ^ k0
        next2 = tl.umulhi(m0, c0) ^ c3 ^ k1
        c1 = m1 * c2
        c3 = m0 * c0
        c0 = next0
        c2 = next2
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def exponential(words):
    """Exponentially distributed float32 numbers above 0, from uniform words uint32; of the largest words, infinite.

    -log1p(-u) for u = (word + 0.5) / 2^32 as float32. 1 - u is rounded to w by dropping d, which is exact, and 0 from
    u = 1/2 on. The slope of the logarithm makes up for it: log(w + d) is nearly log(w) + d / w, 1 / w nearly 1 + u.
    The sum is within about two units in the last place, for the smallest u as well.
    """
    u = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    w = 1.0 - u
    d = (1.0 - w) - u
    return -tl.log(w) - (d + d * u)


@triton.jit
def _sample_kernel(
    logits_ptr,
    scales_ptr,
    temperatures_ptr,
    index_ptr,
    seeds_ptr,
    noise_from_ptr,
    forced_ptr,
    tokens_ptr,
    next_ptr,
    logits_stride,
    forced_stride,
    tokens_stride,
    next_stride,
    top_k,  # float32
    top_p,
    log_min_p,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_UNCOND: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    token_ids = tl.arange(0, BLOCK)
    real = token_ids < V
    index = tl.load(index_ptr)
    if PDL:
        wait_for_inputs()
    x = tl.load(logits_ptr + image * logits_stride + token_ids, mask=real, other=-float("inf")).to(tl.float32)
    if WITH_UNCOND:
        uncond_row = image + tl.num_programs(0)
        uncond = tl.load(logits_ptr + uncond_row * logits_stride + token_ids, mask=real, other=0.0).to(tl.float32)
        scale = tl.load(scales_ptr + index)
        x = tl.where(scale > 1.0, uncond + scale * (x - uncond), x)
    temperature = tl.load(temperatures_ptr + index)
    if temperature != 1.0:
        x = tl.div_rn(x, tl.zeros_like(x) + temperature)
    if GREEDY:
        score = x
    else:
        best = tl.max(x, axis=0)
        weight = tl.exp(x - best)
        low = _key(tl.full((), -float("inf"), tl.float32))
        if TOP_K:
            low = _threshold(x, 1.0, low, _key(best), top_k - 1.0, top_k)
            weight = tl.where(x > _value(low), weight, 0.0)
        if TOP_P:
            low = _threshold(x, weight, low, _key(best), top_p * tl.sum(weight, axis=0), -1.0)
            weight = tl.where(x > _value(low), weight, 0.0)
        weight = tl.where(x < best + log_min_p, 0.0, weight)
        words = philox_words(tl.load(seeds_ptr + image), tl.load(noise_from_ptr) + index, BLOCK)
        score = tl.where(real, weight / exponential(words), -1.0)  # also where all the noise is infinite
    token = tl.argmax(score, axis=0, tie_break_left=True)
    token = tl.minimum(token, V - 1).to(tl.int64)  # rows of NaN, too, give a token that can be fed
    forced = tl.load(forced_ptr + image * forced_stride + index)
    token = tl.where(forced < 0, token, forced)
    tl.store(tokens_ptr + image * tokens_stride + index, token)
    tl.store(next_ptr + image * next_stride, token)


@triton.jit
def _advance_kernel(position_ptr, index_ptr, PDL: tl.constexpr):
    if PDL:
        wait_for_inputs()
    tl.store(position_ptr, tl.load(position_ptr) + 1)
    tl.store(index_ptr, tl.load(index_ptr) + 1)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
    if shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has its last dimension contiguous, not of stride {tensor.stride(-1)}")


def sample_tokens(
    logits: Tensor,
    scales: Tensor,
    temperatures: Tensor,
    index: Tensor,
    seeds: Tensor,
    noise_from: Tensor,
    forced_tokens: Tensor,
    tokens: Tensor,
    next_token: Tensor,
    *,
    with_uncond: bool,
    top_k: int | None = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
) -> None:
    """Sample token `index` of every image, and write it to `tokens[:, index]` and to `next_token`.

    logits (B, V), or [cond; uncond] (2B, V) `with_uncond`: float32, bfloat16 or float16, computed with as float32.
    scales, temperatures float32 (N,): guidance scale (up to 1: none) and temperature (above 0) of each of N tokens.
    index int64 (1,): which of the N tokens, 0 to N - 1. It is read only: `advance` moves on.
    seeds int64 (B,), noise_from int64 (1,): the noise is that of the image's seed at position noise_from + index.
    forced_tokens int64 (B, N): tokens that stand instead of the sampled ones, -1 where there are none.
    tokens int64 (B, N), next_token int64 (B, 1): what is written.

    `top_k` 0 or None, `top_p` 1 and `min_p` 0 keep all tokens. `greedy` takes the likeliest token. Of equal candidates
    the first is taken. ValueError for other shapes, types or ranges; the values in tensors are not looked at. The
    vocabulary is held in registers: up to 16,384 tokens without spilling.
    """
    vocabulary = logits.shape[-1]
    images, count = len(seeds), len(scales)
    if logits.dtype not in _LOGIT_TYPES:
        raise ValueError(f"logits are float32, bfloat16 or float16, not {logits.dtype}")
    _check("logits", logits, logits.dtype, (2 * images if with_uncond else images, vocabulary))
    for name, vector in (("scales", scales), ("temperatures", temperatures)):
        _check(name, vector, torch.float32, (count,))
    for name, matrix in (("forced_tokens", forced_tokens), ("tokens", tokens)):
        _check(name, matrix, torch.int64, (images, count))
    _check("seeds", seeds, torch.int64, (images,))
    _check("next_token", next_token, torch.int64, (images, 1))
    for name, scalar in (("index", index), ("noise_from", noise_from)):
        _check(name, scalar, torch.int64, (1,))
    if (top_k or 0) < 0 or not 0 <= top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(f"top_k is 0 or more, top_p and min_p are 0 to 1, not {top_k}, {top_p}, {min_p}")
    block, pdl = max(16, triton.next_power_of_2(vocabulary)), dependent_launch(logits.device)
    _sample_kernel[(images,)](
        logits,
        scales,
        temperatures,
        index,
        seeds,
        noise_from,
        forced_tokens,
        tokens,
        next_token,
        logits.stride(0),
        forced_tokens.stride(0),
        tokens.stride(0),
        next_token.stride(0),
        float(top_k or 0),
        float(top_p),
        math.log(min_p) if min_p > 0 else -math.inf,
        V=vocabulary,
        BLOCK=block,
        WITH_UNCOND=with_uncond,
        TOP_K=0 < (top_k or 0) < vocabulary,
        TOP_P=top_p < 1,
        GREEDY=greedy,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=min(max(block // 1024, 4), 32 if block > 16384 else 16),
        enable_fp_fusion=False,  # the plain functions round each product
    )


def advance(position: Tensor, index: Tensor) -> None:
    """Add 1 to both, int64 (1,), in one launch. ValueError for other shapes or types."""
    _check("position", position, torch.int64, (1,))
    _check("index", index, torch.int64, (1,))
    pdl = dependent_launch(position.device)
    _advance_kernel[(1,)](position, index, PDL=pdl, launch_pdl=pdl, num_warps=1)
