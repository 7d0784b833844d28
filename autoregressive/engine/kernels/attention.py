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
from autoregressive.models.cache import LARGEST


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
def _quantized(x, INTEGER: tl.constexpr):
    """The vector `x` in float32 numbers that int8 (INTEGER) or fp8 holds exactly, and its float32 scale.

    Rounds to nearest, ties to even, by adding a number so large that what must go has no place behind it. fp8 has 3
    bits behind its leading one, which stands at 2^-6 at least.
    """
    x = x.to(tl.float32)
    LARGEST: tl.constexpr = 127.0 if INTEGER else 448.0
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12)
    scaled = x * tl.div_rn(LARGEST, largest)
    step = tl.full(x.shape, 1.0, tl.float32)
    if not INTEGER:
        leading = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(leading, 0.015625) * 0.125
    large = step * 12582912.0  # 1.5 * 2^23
    return (scaled + large) - large, largest * (1 / LARGEST)


@triton.jit
def _as_float32(x):
    """`x` in float32; int8 through the bits of 1.5 * 2^23 + x, as the GPU has few units that convert integers."""
    if x.dtype == tl.int8:
        wide = (x.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _attend_cached(
    q, keys, values, key_scales, value_scales, first, position, lanes,
    POSITION_STRIDE: tl.constexpr, LOADED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over the cached positions first..position-1 in TILE slots; slot i takes the keys first + i + n * TILE.

    `key_scales` and `value_scales` point to a number for each position, or are None.

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
        k = _as_float32(tl.load(keys + offsets, mask=inside, other=0.0))
        v = _as_float32(tl.load(values + offsets, mask=inside, other=0.0))
        scores = tl.sum(k * q[None, :], axis=1)
        if key_scales is not None:
            scores *= tl.load(key_scales + at, mask=at < position, other=0.0)
        scores = tl.where(at < position, scores, float("-inf"))
        before = highest
        highest = tl.maximum(before, scores)
        fade = tl.exp2(before - highest)
        weight = tl.exp2(scores - highest)
        total = tl.fma(total, fade, weight)
        if value_scales is not None:
            weight *= tl.load(value_scales + at, mask=at < position, other=0.0)
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
    qkv, qkv_row_stride, rope_table, position_pointer, first_key, k_cache, v_cache, k_scale, v_scale, out, score_scale,
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
    key_scales = None
    value_scales = None
    if k_scale is not None:
        key_scales = k_scale + row * (ROW_STRIDE // POSITION_STRIDE) + kv_head * (HEAD_STRIDE // POSITION_STRIDE)
        value_scales = v_scale + row * (ROW_STRIDE // POSITION_STRIDE) + kv_head * (HEAD_STRIDE // POSITION_STRIDE)
    if PREFETCH:
        _prefetch_cached(keys, values, first * POSITION_STRIDE, position * POSITION_STRIDE)
    if PDL:
        wait_for_inputs()

    heads = qkv + row * qkv_row_stride
    q = _rotated(heads + head * HEAD_DIM, angles, lanes, HEAD_DIM).to(tl.float32) * score_scale
    new_k = _rotated(heads + (N_HEAD + kv_head) * HEAD_DIM, angles, lanes, HEAD_DIM)
    new_v = tl.load(heads + (N_HEAD + N_KV_HEAD + kv_head) * HEAD_DIM + lanes, mask=lanes < HEAD_DIM, other=0.0)

    highest, total, mixed = _attend_cached(
        q, keys, values, key_scales, value_scales, first, position, lanes, POSITION_STRIDE, LOADED, TILE, STAGES
    )

    # No program reads these entries: each has the new key and value in registers. One head of a group stores them.
    stores = head % (N_HEAD // N_KV_HEAD) == 0
    stored = (lanes < HEAD_DIM) & stores
    if k_scale is not None:
        new_k, new_k_scale = _quantized(new_k, k_cache.dtype.element_ty == tl.int8)
        new_v, new_v_scale = _quantized(new_v, v_cache.dtype.element_ty == tl.int8)
        tl.store(key_scales + position, new_k_scale, mask=stores)
        tl.store(value_scales + position, new_v_scale, mask=stores)
    tl.store(keys + position * POSITION_STRIDE + lanes, new_k.to(k_cache.dtype.element_ty), mask=stored)
    tl.store(values + position * POSITION_STRIDE + lanes, new_v.to(v_cache.dtype.element_ty), mask=stored)

    new_score = tl.sum(q * new_k.to(tl.float32), axis=0)
    if k_scale is not None:
        new_score *= new_k_scale
    overall = tl.maximum(tl.max(highest, axis=0), new_score)
    share = tl.exp2(highest - overall)
    new_weight = tl.exp2(new_score - overall)
    weights = tl.sum(total * share, axis=0) + new_weight
    if v_scale is not None:
        new_weight *= new_v_scale
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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
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

    With `k_scale` and `v_scale`, float32 (cache_rows, n_kv_head, positions), the caches are int8 or float8_e4m3fn and
    hold vector / scale, as `quantize_vectors` makes both: padding counts in 16 numbers, the scales at `position` are
    written too, and the new key and value are attended to as they are stored. The strides of the scales are those of
    the caches over the stride of a position. float8_e4m3fn needs a GPU of compute capability 8.9 or later.

    `out` receives the result if it is passed. ValueError if shapes, dtypes or strides are not these.
    """
    n_kv_head, head_dim = k_cache.shape[1], k_cache.shape[3]
    _check_caches(k_cache, v_cache, qkv, n_head)
    _check_formats(k_cache, v_cache, k_scale, v_scale, qkv.dtype)
    _check_positions(rope_table, position, first_key, len(qkv), head_dim)
    if out is None:
        out = torch.empty(len(qkv), n_head * head_dim, dtype=qkv.dtype, device=qkv.device)
    elif out.shape != (len(qkv), n_head * head_dim) or out.dtype != qkv.dtype or not out.is_contiguous():
        raise ValueError(f"out must be a contiguous {qkv.dtype} tensor ({len(qkv)}, {n_head * head_dim})")
    lanes = max(16, triton.next_power_of_2(head_dim))
    config, pdl = config or DEFAULT, dependent_launch(qkv.device)
    row_stride, head_stride, position_stride, _ = k_cache.stride()
    size = k_cache.element_size()
    word = 16 if size == 1 else 8
    rounded_up = -(-head_dim // word) * word
    _decode_attention_kernel[(len(qkv) * n_head,)](
        qkv, qkv.stride(0), rope_table, position, first_key, k_cache, v_cache, k_scale, v_scale, out,
        math.log2(math.e) / math.sqrt(head_dim),
        N_HEAD=n_head, N_KV_HEAD=n_kv_head, HEAD_DIM=head_dim,
        ROW_STRIDE=row_stride, HEAD_STRIDE=head_stride, POSITION_STRIDE=position_stride,
        LOADED=rounded_up if position_stride >= rounded_up else head_dim,
        LANES=lanes, TILE=max(16, config.tile_bytes // (lanes * size)), STAGES=config.num_stages,
        PREFETCH=config.prefetch and qkv.is_cuda, PDL=pdl, launch_pdl=pdl, num_warps=config.num_warps,
        maxnreg=128 if size == 1 else None,  # some widths take a few more, and half as many programs would run at once
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
    if n_head % n_kv_head or head_dim % 2:
        raise ValueError(f"{n_kv_head} key heads cannot serve {n_head} query heads of width {head_dim}")
    width = (n_head + 2 * n_kv_head) * head_dim
    if qkv.ndim != 2 or qkv.shape[1] != width or qkv.stride(1) != 1:
        raise ValueError(f"qkv must be (rows, {width}) with contiguous rows, not {tuple(qkv.shape)}")
    if len(qkv) > rows:
        raise ValueError(f"the caches have {rows} rows, too few for {len(qkv)}")


def _check_formats(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, dtype: torch.dtype
) -> None:
    """ValueError unless the caches are of `dtype` without scales, or of 8 bits with scales laid out as they are."""
    if k_scale is None and v_scale is None:
        if not k_cache.dtype == v_cache.dtype == dtype:
            raise ValueError(f"the caches must be {dtype} as qkv is, not {k_cache.dtype} and {v_cache.dtype}")
        return
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in LARGEST:
        raise ValueError(f"caches with scales are int8 or float8_e4m3fn, not {k_cache.dtype} and {v_cache.dtype}")
    strides = tuple(stride // k_cache.stride(2) for stride in k_cache.stride()[:3])
    for scale in (k_scale, v_scale):
        if scale is None or scale.dtype != torch.float32 or scale.shape != k_cache.shape[:3]:
            raise ValueError(f"both scales must be float32 {tuple(k_cache.shape[:3])}")
        if scale.stride() != strides:
            raise ValueError(f"the scales must have the strides {strides}, not {scale.stride()}")


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
