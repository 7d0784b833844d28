"""Attention of one decode step: rotary embedding, the new entries of the KV cache, and the attention itself.

The position is read on the device, so one captured launch serves every position. A program computes one query head of
one row, alone and in an order that depends on nothing else: a row's result is bit-equal whatever other rows there are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregressive.engine.kernels.launch import dependent_launch, prefetch, wait_for_inputs


class Config(NamedTuple):
    """Launch parameters. `tile_bytes` of keys, and again of values, are taken in at once, `num_stages` - 1 such tiles
    are on their way; `prefetch` asks for keys and values in the L2 cache before the kernel waits for the one before."""

    tile_bytes: int = 8192
    num_warps: int = 8
    num_stages: int = 3
    prefetch: bool = False


DEFAULT = Config()
# Worth timing. Results of different tiles or warps differ in their last bits: a choice must not depend on the rows.
CANDIDATES = (
    DEFAULT,
    Config(prefetch=True),
    Config(16384),
    Config(16384, num_warps=16),
    Config(8192, num_warps=4),
    Config(4096, num_warps=4),
    Config(4096, num_warps=4, num_stages=4),
    Config(2048, num_warps=2, num_stages=4),
)


@triton.jit
def _rotated(x, angles, lanes, HEAD_DIM: tl.constexpr):
    """The head at pointer `x`, turned in float32 by the (cos, sin) pairs at `angles`, in its own dtype."""
    inside = lanes < HEAD_DIM
    own = tl.load(x + lanes, mask=inside, other=0.0)
    partner = tl.load(x + (lanes ^ 1), mask=inside, other=0.0).to(tl.float32)
    pair = lanes // 2 * 2
    cos = tl.load(angles + pair, mask=inside, other=0.0)
    sin = tl.load(angles + pair + 1, mask=inside, other=0.0)
    turned = own.to(tl.float32) * cos + tl.where(lanes % 2 == 0, -partner, partner) * sin
    return turned.to(own.dtype)


@triton.jit
def _attend_cached(
    q, keys, values, first, position, lanes,
    POSITION_STRIDE: tl.constexpr, LOADED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over the cached positions first..position-1 in TILE slots; slot i takes the keys first + i + n * TILE.

    Returns the maximum (TILE,) of the scores of each slot, and with weights 2^(score - maximum) their sum (TILE,) and
    the weighted sum of values (TILE, lanes). Slots meet only after the loop: nothing in it is reduced across warps.
    """
    # The lowest float32 instead of -inf: the difference to itself is 0, not NaN, while a slot has seen no key.
    highest = tl.full([TILE], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, lanes.shape[0]], tl.float32)
    slots = tl.arange(0, TILE)
    for start in tl.range(first, position, TILE, num_stages=STAGES):
        at = start + slots
        offsets = at[:, None] * POSITION_STRIDE + lanes[None, :]
        inside = (at < position)[:, None] & (lanes < LOADED)[None, :]
        k = tl.load(keys + offsets, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(at < position, tl.sum(k * q[None, :], axis=1), float("-inf"))
        before = highest
        highest = tl.maximum(before, scores)
        fade = tl.exp2(before - highest)
        weight = tl.exp2(scores - highest)
        total = tl.fma(total, fade, weight)
        mixed = tl.fma(tl.broadcast_to(weight[:, None], mixed.shape), v, mixed * fade[:, None])
    return highest, total, mixed


@triton.jit
def _prefetch_cached(keys, values, start, end):
    """Ask for the numbers `start` to `end` of both in the L2 cache."""
    line: tl.constexpr = 1024 // keys.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    for at in range(start, end, 256 * line):
        places = tl.minimum(at + tl.arange(0, 256) * line, end - 1)
        prefetch(keys + places)
        prefetch(values + places)


@triton.jit
def _decode_attention_kernel(
    qkv, qkv_row_stride, rope_table, position_pointer, first_key, k_cache, v_cache, out, score_scale,
    N_HEAD: tl.constexpr, N_KV_HEAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROW_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, POSITION_STRIDE: tl.constexpr,
    LOADED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query head of one row. LOADED lanes of each cached key and value are read, in blocks of LANES."""
    row = (tl.program_id(0) // N_HEAD).to(tl.int64)
    head = tl.program_id(0) % N_HEAD
    kv_head = head // (N_HEAD // N_KV_HEAD)
    lanes = tl.arange(0, LANES)
    position = tl.load(position_pointer).to(tl.int32)
    angles = rope_table + position * HEAD_DIM
    first = 0
    if first_key is not None:
        first = tl.maximum(tl.load(first_key + row), 0).to(tl.int32)
    keys = k_cache + row * ROW_STRIDE + kv_head * HEAD_STRIDE
    values = v_cache + row * ROW_STRIDE + kv_head * HEAD_STRIDE
    if PREFETCH:
        _prefetch_cached(keys, values, first * POSITION_STRIDE, position * POSITION_STRIDE)
    if PDL:
        wait_for_inputs()

    heads = qkv + row * qkv_row_stride
    q = _rotated(heads + head * HEAD_DIM, angles, lanes, HEAD_DIM).to(tl.float32) * score_scale
    new_k = _rotated(heads + (N_HEAD + kv_head) * HEAD_DIM, angles, lanes, HEAD_DIM)
    new_v = tl.load(heads + (N_HEAD + N_KV_HEAD + kv_head) * HEAD_DIM + lanes, mask=lanes < HEAD_DIM, other=0.0)

    highest, total, mixed = _attend_cached(
        q, keys, values, first, position, lanes, POSITION_STRIDE, LOADED, TILE, STAGES
    )

    # No program reads these entries: each has the new key and value in registers. One head of a group stores them.
    stored = (lanes < HEAD_DIM) & (head % (N_HEAD // N_KV_HEAD) == 0)
    tl.store(keys + position * POSITION_STRIDE + lanes, new_k, mask=stored)
    tl.store(values + position * POSITION_STRIDE + lanes, new_v, mask=stored)

    new_score = tl.sum(q * new_k.to(tl.float32), axis=0)
    overall = tl.maximum(tl.max(highest, axis=0), new_score)
    share = tl.exp2(highest - overall)
    new_weight = tl.exp2(new_score - overall)
    weights = tl.sum(total * share, axis=0) + new_weight
    weighted = tl.sum(mixed * share[:, None], axis=0) + new_weight * new_v.to(tl.float32)
    at = row * (N_HEAD * HEAD_DIM) + head * HEAD_DIM + lanes
    tl.store(out + at, (weighted / weights).to(out.dtype.element_ty), mask=lanes < HEAD_DIM)


def decode_attention(
    qkv: Tensor,
    rope_table: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    n_head: int,
    first_key: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Rotate the new query and key, store the new key and value, attend: (rows, n_head * head_dim) in qkv's dtype.

    `qkv` (rows, (n_head + 2 * n_kv_head) * head_dim) holds the query heads, the key heads, then the value heads of one
    new token per row, in float32, bfloat16 or float16; n_head / n_kv_head consecutive query heads share a key head.
    `rope_table` is float32 (positions, head_dim / 2, 2), `position` int64 (1,), below the positions of the table and
    of the caches (which is not checked: it is known on the device alone).

    The caches are (cache_rows >= rows, n_kv_head, positions, head_dim) in qkv's dtype, with equal strides. The vector
    of a position may be padded: where its stride has room for head_dim rounded up to a multiple of 8, that much is
    read, so the padding must belong to the storage and hold zeros. The entries at `position` of the first `rows` rows
    are written, nothing else. Row i attends to the keys from first_key[i] (int32 or int64 (rows,); None means 0) to
    `position`, always including the latter. Scores, softmax and sums are float32.

    `out` receives the result if it is passed. ValueError if shapes, dtypes or strides are not these.
    """
    n_kv_head, head_dim = k_cache.shape[1], k_cache.shape[3]
    _check_caches(k_cache, v_cache, qkv, n_head)
    _check_positions(rope_table, position, first_key, len(qkv), head_dim)
    if out is None:
        out = torch.empty(len(qkv), n_head * head_dim, dtype=qkv.dtype, device=qkv.device)
    elif out.shape != (len(qkv), n_head * head_dim) or out.dtype != qkv.dtype or not out.is_contiguous():
        raise ValueError(f"out must be a contiguous {qkv.dtype} tensor ({len(qkv)}, {n_head * head_dim})")
    lanes = max(16, triton.next_power_of_2(head_dim))
    config, pdl = config or DEFAULT, dependent_launch(qkv.device)
    row_stride, head_stride, position_stride, _ = k_cache.stride()
    rounded_up = -(-head_dim // 8) * 8
    _decode_attention_kernel[(len(qkv) * n_head,)](
        qkv, qkv.stride(0), rope_table, position, first_key, k_cache, v_cache, out,
        math.log2(math.e) / math.sqrt(head_dim),
        N_HEAD=n_head, N_KV_HEAD=n_kv_head, HEAD_DIM=head_dim,
        ROW_STRIDE=row_stride, HEAD_STRIDE=head_stride, POSITION_STRIDE=position_stride,
        LOADED=rounded_up if position_stride >= rounded_up else head_dim,
        LANES=lanes, TILE=max(16, config.tile_bytes // (lanes * qkv.element_size())), STAGES=config.num_stages,
        PREFETCH=config.prefetch and qkv.is_cuda, PDL=pdl, launch_pdl=pdl, num_warps=config.num_warps,
        enable_fp_fusion=False,  # the rotation rounds as that of PyTorch does; fma stands where it is meant
    )  # fmt: skip
    return out


def _check_caches(k_cache: Tensor, v_cache: Tensor, qkv: Tensor, n_head: int) -> None:
    """ValueError unless the caches suit each other and `qkv`."""
    rows, n_kv_head, _, head_dim = k_cache.shape
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError("the caches must have equal shapes and strides, the last of which is 1")
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"qkv must be float32, bfloat16 or float16, not {qkv.dtype}")
    if not k_cache.dtype == v_cache.dtype == qkv.dtype:
        raise ValueError(f"the caches must be {qkv.dtype} as qkv is, not {k_cache.dtype} and {v_cache.dtype}")
    if n_head % n_kv_head or head_dim % 2:
        raise ValueError(f"{n_kv_head} key heads cannot serve {n_head} query heads of width {head_dim}")
    width = (n_head + 2 * n_kv_head) * head_dim
    if qkv.ndim != 2 or qkv.shape[1] != width or qkv.stride(1) != 1:
        raise ValueError(f"qkv must be (rows, {width}) with contiguous rows, not {tuple(qkv.shape)}")
    if len(qkv) > rows:
        raise ValueError(f"the caches have {rows} rows, too few for {len(qkv)}")


def _check_positions(rope_table: Tensor, position: Tensor, first_key: Tensor | None, rows: int, head_dim: int) -> None:
    """ValueError unless the table and the position tensors have the shapes and dtypes of `decode_attention`."""
    if rope_table.shape[1:] != (head_dim // 2, 2) or rope_table.dtype != torch.float32:
        raise ValueError(f"the rope table must be float32 (positions, {head_dim // 2}, 2)")
    if not rope_table.is_contiguous():
        raise ValueError("the rope table must be contiguous")
    if position.shape != (1,) or position.dtype != torch.int64:
        raise ValueError("position must be int64 (1,)")
    if first_key is not None and (
        first_key.shape != (rows,) or first_key.dtype not in (torch.int32, torch.int64) or not first_key.is_contiguous()
    ):
        raise ValueError(f"first_key must be contiguous int32 or int64 ({rows},)")
