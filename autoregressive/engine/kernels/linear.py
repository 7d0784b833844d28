"""Products of at most 64 rows with a matrix read once; RMSNorm, SwiGLU and the residual are in the same kernels.

A decode step multiplies 2 to 64 rows by every matrix of the model: its time is that of reading the weights, and of
starting kernels. A program owns `block_n` outputs of all rows. Its warps split the inputs between them (`k_splits`):
with few outputs there are few programs, and each must keep many bytes on their way from memory.

RMSNorm costs no kernel and no pass. Whoever writes the residual stream (`embed`, `add_linear`) also writes it times the
weight of the norm that follows, and the sums of its squares in parts of 16. Whoever multiplies the normalised stream
reads these, and scales the products by 1 / rms at the end: that factor belongs to a row. The inner loop is nothing but
copies to shared memory and matrix instructions.

The order in which the products of a row are added depends on the inputs and the dtype alone, never on the number of
rows: a row has the same bits whatever rows are next to it. The weights stand on the left of the matrix instruction. Its
tile of 16 rows is then full however few activations there are, and `block_n` stays below the 64 rows from which Triton
may prefer an instruction of another internal precision (wgmma).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregressive.engine.kernels.launch import dependent_launch, prefetch, wait_for_inputs

MAX_ROWS = 64
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MULTIPROCESSORS = 132  # of an H100 or H200
_SHARED_BYTES = 220 * 1024  # of the 227 KiB a program may hold
_PART = tl.constexpr(16)  # outputs whose squares are summed together


class Stream(NamedTuple):
    """The residual stream before a norm: `h` (M, D), `scaled` (M, D) = h * the norm's weight, both of one dtype, and
    `squares` float32 (M, ceil(D / 16)), the sums of h^2 over 16 neighbours."""

    h: Tensor
    scaled: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Config:
    """Launch parameters of the products; the sizes are powers of two.

    A program computes `block_n` outputs (16 or 32). A step of its loop reads `block_k` inputs, divided among `k_splits`
    groups of its `num_warps` warps (at least 16 inputs each); `num_stages` - 1 steps are in flight. `prefetch` asks for
    the weights in the L2 cache before the kernel waits for the one before it to end.
    """

    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 3
    k_splits: int = 8
    prefetch: bool = False


def default_config(m: int, n: int, k: int, element_size: int, matrices: int = 1) -> Config:
    """The launch parameters for (m, k) activations of `element_size` bytes and `matrices` weights (n, k).

    `block_k` depends on the element size alone and `k_splits` is fixed: a row has the same bits for any `m`. A program
    has 32 outputs where every multiprocessor then still has work, else 16.
    """
    block_k = 128 if element_size == 4 else 512  # the float32 operands of a step are all in registers
    block_n = 32 if element_size == 2 and n >= 32 * (_MULTIPROCESSORS * 3 // 4) else 16
    if _shared_bytes(m, block_n, block_k, 3, matrices, element_size) > _SHARED_BYTES:
        block_n = 16
    return Config(block_n, block_k)


def candidate_configs(m: int, n: int, k: int, matrices: int = 1) -> list[Config]:
    """At most eight launch parameters worth timing for 2-byte operands, the default first.

    `m`, `n`, `k` and `matrices` are those of `default_config`. Results of different `block_k` or `k_splits` differ in
    their last bits, so a choice among them must not depend on `m`.
    """
    default = default_config(m, n, k, 2, matrices)
    others = [
        replace(default, prefetch=not default.prefetch),
        replace(default, block_n=48 - default.block_n),  # 16 for 32, 32 for 16
        replace(default, block_k=256, num_stages=4),
        replace(default, block_k=256, num_stages=5, num_warps=4, k_splits=4),
        replace(default, num_warps=4, k_splits=4),
        replace(default, block_k=1024, num_stages=2),
    ]

    def fits(c: Config) -> bool:
        return _shared_bytes(m, c.block_n, c.block_k, c.num_stages, matrices, 2) <= _SHARED_BYTES

    return [default, *(c for c in others if c != default and fits(c))]


def _shared_bytes(m: int, block_n: int, block_k: int, num_stages: int, matrices: int, element_size: int) -> int:
    """Shared memory of the operands on their way."""
    return element_size * block_k * (_tile_rows(m) + matrices * block_n) * (num_stages - 1)


def embed(tokens: Tensor, table: Tensor, norm_weight: Tensor, copies: int = 1) -> Stream:
    """Rows `tokens` int64 (B,) of `table` (V, D), `copies` times one after the other: a stream of copies * B rows."""
    images, dim = len(tokens), table.shape[1]
    _check_tensor("tokens", tokens, (images,), (torch.int64,))
    _check_tensor("norm_weight", norm_weight, (dim,), (table.dtype,))
    out = _empty_stream(copies * images, dim, table)
    pdl = dependent_launch(table.device)
    _embed_kernel[(copies * images,)](
        tokens, table, norm_weight, *out, images, dim, BLOCK=triton.next_power_of_2(dim), PDL=pdl, launch_pdl=pdl
    )  # fmt: skip
    return out


def linear(
    x: Tensor | Stream, weight: Tensor, *, eps: float = 1e-5, scale: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """x @ weight.T * scale, or rms_norm(x) @ weight.T * scale of a stream: (M, N).

    `x` is (M, K), bfloat16, float16 or float32, M at most 64 and K a multiple of 8. `weight` (N, K) has its dtype, or
    is int8 with a `scale` (N,) of that dtype or float32. `eps` is the norm's. All tensors are contiguous. ValueError
    for any other.
    """
    return _multiply(x, weight, eps, scale, config)[0]


def add_linear(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    *,
    scale: Tensor | None = None,
    config: Config | None = None,
) -> Stream:
    """The stream residual + x @ weight.T * scale, ready for the norm of `norm_weight` (N,).

    `residual` (M, N) and `norm_weight` have the dtype of `x`; the rest is as for `linear`.
    """
    return Stream(*_multiply(x, weight, 0.0, scale, config, residual, norm_weight))


def _multiply(
    x: Tensor | Stream,
    weight: Tensor,
    eps: float,
    scale: Tensor | None,
    config: Config | None,
    residual: Tensor | None = None,
    next_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What both products have in common: the result, and with `residual` the other parts of a stream."""
    x, squares = (x.scaled, x.squares) if isinstance(x, Stream) else (x, None)
    m, n, k = _check_operands(x, squares, [weight], [scale])
    adds = residual is not None
    _check_tensor("residual", residual, (m, n), (x.dtype,))
    _check_tensor("norm_weight", next_norm, (n,), (x.dtype,))
    out = _empty_stream(m, n, x) if adds else (torch.empty(m, n, dtype=x.dtype, device=x.device), None, None)
    config = config or default_config(m, n, k, x.element_size())
    _linear_kernel[(triton.cdiv(n, config.block_n),)](
        x, weight, squares, residual, next_norm, scale, *out, m, n, k, eps,
        NORM=squares is not None, ADD=adds, SCALE=scale is not None, **_launch_options(config, x, k),
    )  # fmt: skip
    return out


def swiglu(
    x: Stream,
    w1: Tensor,
    w3: Tensor,
    *,
    eps: float = 1e-5,
    scale1: Tensor | None = None,
    scale3: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """silu(y @ w1.T * scale1) * (y @ w3.T * scale3) with y = rms_norm(x), of shape (M, H).

    `w1` and `w3` (H, K) have one dtype; `scale1` and `scale3` (H,) come together or not at all. The rest is as for
    `linear`.
    """
    m, n, k = _check_operands(x.scaled, x.squares, [w1, w3], [scale1, scale3])
    out = torch.empty(m, n, dtype=x.h.dtype, device=x.h.device)
    config = config or default_config(m, n, k, out.element_size(), matrices=2)
    _swiglu_kernel[(triton.cdiv(n, config.block_n),)](
        x.scaled, w1, w3, x.squares, scale1, scale3, out, m, n, k, eps,
        SCALE=scale1 is not None, **_launch_options(config, out, k),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, out: Tensor | None = None) -> Tensor:
    """`layers.RMSNorm` of the rows of `x` (..., K), any number of them; `weight` (K,); `out` may be `x` itself."""
    out = torch.empty_like(x) if out is None else out
    _check_tensor("x", x, x.shape, _DTYPES)
    _check_tensor("weight", weight, x.shape[-1:], (x.dtype,))
    _check_tensor("out", out, x.shape, (x.dtype,))
    k = x.shape[-1]
    if x.numel():
        _rms_norm_kernel[(x.numel() // k,)](x, weight, out, k, eps, BLOCK=triton.next_power_of_2(k))
    return out


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """F.silu(gate) * up of one shape and dtype, to which both operations round; `out` may be either of them."""
    out = torch.empty_like(gate) if out is None else out
    _check_tensor("gate", gate, gate.shape, _DTYPES)
    for name, tensor in (("up", up), ("out", out)):
        _check_tensor(name, tensor, gate.shape, (gate.dtype,))
    size, block = gate.numel(), 1024
    if size:
        _silu_mul_kernel[(triton.cdiv(size, block),)](gate, up, out, size, BLOCK=block)
    return out


def _check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless `tensor` is None or contiguous, of `shape` and of one of `dtypes`."""
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtypes} {tuple(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def _check_operands(
    x: Tensor, squares: Tensor | None, weights: list[Tensor], scales: list[Tensor | None]
) -> tuple[int, int, int]:
    """M, N and K of `x` (M, K) and `weights` (N, K); ValueError for what the kernels cannot take."""
    if x.dim() != 2 or weights[0].dim() != 2:
        raise ValueError(f"x and weight have two dimensions, not {x.dim()} and {weights[0].dim()}")
    (m, k), n = x.shape, weights[0].shape[0]
    if not 1 <= m <= MAX_ROWS or k % 8 or not k or not n:
        raise ValueError(f"x {tuple(x.shape)} has 1 to {MAX_ROWS} rows and a multiple of 8 columns")
    _check_tensor("x", x, (m, k), _DTYPES)
    _check_tensor("squares", squares, (m, triton.cdiv(k, _PART.value)), (torch.float32,))
    quantized = weights[0].dtype == torch.int8
    for weight, scale in zip(weights, scales):
        _check_tensor("weight", weight, (n, k), (torch.int8 if quantized else x.dtype,))
        _check_tensor("scale", scale, (n,), (x.dtype, torch.float32))
        if quantized == (scale is None):
            raise ValueError("int8 weights need a scale, and other weights take none")
    return m, n, k


def _empty_stream(m: int, n: int, like: Tensor) -> Stream:
    h, scaled = (torch.empty(m, n, dtype=like.dtype, device=like.device) for _ in range(2))
    parts = triton.cdiv(n, _PART.value)
    return Stream(h, scaled, torch.empty(m, parts, dtype=torch.float32, device=like.device))


def _launch_options(config: Config, x: Tensor, k: int) -> dict[str, int | bool]:
    """What both kernels take from `config`. Only a GPU has a cache to prefetch to."""
    pdl = dependent_launch(x.device)
    return {
        "EVEN": k % config.block_k == 0,
        "PREFETCH": config.prefetch and x.is_cuda,
        "PDL": pdl,
        "ROWS": _tile_rows(x.shape[0]),
        "PARTS": triton.next_power_of_2(triton.cdiv(k, _PART.value)),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLITS": config.k_splits,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "launch_pdl": pdl,
    }


def _tile_rows(m: int) -> int:
    """Rows of the activations' tile: 8, 16, 32 or 64, the smallest that holds `m`."""
    return max(8, triton.next_power_of_2(m))


@triton.jit
def _prefetch(weight, N, K, BLOCK_N: tl.constexpr):
    """Ask for this program's rows of `weight` (N, K) in the L2 cache, and go on without waiting for them."""
    outputs = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # weights in 128 bytes
    for start in range(0, K, 16 * line):
        columns = tl.minimum(start + tl.arange(0, 16) * line, K - 1)
        prefetch(weight + outputs[:, None] * K + columns[None, :])


@triton.jit
def _split_inputs(BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """Inputs of one step (SPLITS, BLOCK_K / SPLITS), counted from its first: each split has neighbouring ones."""
    width: tl.constexpr = BLOCK_K // SPLITS
    return tl.arange(0, SPLITS)[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def _load_squares(squares, rows, M, K, PARTS: tl.constexpr):
    """The parts of the sums of squares, float32 (ROWS, PARTS): along a row they lie in one warp for any M."""
    count = tl.cdiv(K, _PART)
    parts = tl.arange(0, PARTS)
    mask = (rows[:, None] < M) & (parts[None, :] < count)
    return tl.load(squares + rows[:, None] * count + parts[None, :], mask=mask, other=0.0)


@triton.jit
def _load_rows(x, rows, k, M, K, EVEN: tl.constexpr):
    """The activations (splits, ROWS, inputs of a split) at the inputs `k` (splits, inputs)."""
    mask = (rows < M)[None, :, None]
    if not EVEN:
        mask = mask & (k < K)[:, None, :]
    return tl.load(x + rows[None, :, None] * K + k[:, None, :], mask=mask, other=0.0)


@triton.jit
def _load_weights(weight, outputs, k, N, K, EVEN: tl.constexpr):
    """The weights (splits, outputs, inputs of a split)."""
    mask = (outputs < N)[None, :, None]
    if not EVEN:
        mask = mask & (k < K)[:, None, :]
    pointers = weight + outputs[None, :, None].to(tl.int64) * K + k[:, None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _add_first(sums):
    """The sum over the first axis, of length 1 to 16, by halves: tl.sum would take its order from the other lengths."""
    for _ in tl.static_range(4):
        if sums.shape[0] > 1:
            halves = tl.reshape(sums, (2, sums.shape[0] // 2, sums.shape[1], sums.shape[2]))
            first, second = tl.split(tl.permute(halves, (1, 2, 3, 0)))
            sums = first + second
    return tl.reshape(sums, (sums.shape[1], sums.shape[2]))


@triton.jit
def _product(sums, row_factor, factor, NORM: tl.constexpr, SCALE: tl.constexpr, dtype: tl.constexpr):
    """Sums of the splits to products (outputs, ROWS) in float32, holding values rounded to `dtype` as F.linear's."""
    product = _add_first(sums)
    if NORM:
        product = product * row_factor[None, :]
    product = product.to(dtype).to(tl.float32)
    if SCALE:
        product = (product * factor[:, None]).to(dtype).to(tl.float32)
    return product


@triton.jit
def _load_scale(scale, outputs, N, SCALE: tl.constexpr):
    """The factor of each output, float32; loaded before the products, which hide its latency."""
    factor = outputs.to(tl.float32)  # stands in, unread, where there is no scale
    if SCALE:
        factor = tl.load(scale + outputs, mask=outputs < N, other=0.0).to(tl.float32)
    return factor


@triton.jit
def _silu(gate, dtype: tl.constexpr):
    """gate / (1 + exp(-gate)) of float32 values, rounded to `dtype` and returned in float32."""
    return tl.math.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, weight, squares, residual, next_norm, scale, out, scaled, next_squares, M, N, K, eps,
    NORM: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    rows, outputs = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = _split_inputs(BLOCK_K, SPLITS)
    factor = _load_scale(scale, outputs, N, SCALE)
    if PREFETCH:
        _prefetch(weight, N, K, BLOCK_N)
    if PDL:
        wait_for_inputs()
    mask = (outputs < N)[:, None] & (rows < M)[None, :]
    place = rows[None, :] * N + outputs[:, None]
    # what the end needs is loaded before the products, which hide its latency
    if NORM:
        parts = _load_squares(squares, rows, M, K, PARTS)
    if ADD:
        addend = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        norm_weight = tl.load(next_norm + outputs, mask=outputs < N, other=0.0).to(tl.float32)
    sums = tl.zeros((SPLITS, BLOCK_N, ROWS), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + within
        tile = _load_rows(x, rows, k, M, K, EVEN).permute(0, 2, 1)
        weights = _load_weights(weight, outputs, k, N, K, EVEN).to(dtype)
        sums = tl.dot(weights, tile, sums, input_precision="ieee")
    row_factor = rows.to(tl.float32)
    if NORM:
        row_factor = tl.rsqrt(tl.sum(parts, 1) / K + eps)
    product = _product(sums, row_factor, factor, NORM, SCALE, dtype)
    if ADD:
        product = (product + addend).to(dtype).to(tl.float32)
        tl.store(scaled + place, (product * norm_weight[:, None]).to(dtype), mask=mask)
        _store_squares(next_squares, product, rows, M, N, BLOCK_N)
    tl.store(out + place, product.to(dtype), mask=mask)


@triton.jit
def _store_squares(squares, h, rows, M, N, BLOCK_N: tl.constexpr):
    """The sums of the squares of `h` (BLOCK_N, ROWS), which is 0 beyond N, over each `_PART` of its first axis."""
    squared = tl.reshape(h * h, (BLOCK_N // _PART, _PART, h.shape[1]))
    sums = _add_first(tl.permute(squared, (1, 0, 2)))
    parts = tl.program_id(0) * (BLOCK_N // _PART) + tl.arange(0, BLOCK_N // _PART)
    count = tl.cdiv(N, _PART)
    mask = (parts < count)[:, None] & (rows < M)[None, :]
    tl.store(squares + rows[None, :] * count + parts[:, None], sums, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _swiglu_kernel(
    x, w1, w3, squares, scale1, scale3, out, M, N, K, eps,
    SCALE: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    rows, outputs = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = _split_inputs(BLOCK_K, SPLITS)
    factor1 = _load_scale(scale1, outputs, N, SCALE)
    factor3 = _load_scale(scale3, outputs, N, SCALE)
    if PREFETCH:
        _prefetch(w1, N, K, BLOCK_N)
        _prefetch(w3, N, K, BLOCK_N)
    if PDL:
        wait_for_inputs()
    parts = _load_squares(squares, rows, M, K, PARTS)
    gates = tl.zeros((SPLITS, BLOCK_N, ROWS), tl.float32)
    ups = tl.zeros((SPLITS, BLOCK_N, ROWS), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + within
        tile = _load_rows(x, rows, k, M, K, EVEN).permute(0, 2, 1)
        gates = tl.dot(_load_weights(w1, outputs, k, N, K, EVEN).to(dtype), tile, gates, input_precision="ieee")
        ups = tl.dot(_load_weights(w3, outputs, k, N, K, EVEN).to(dtype), tile, ups, input_precision="ieee")
    row_factor = tl.rsqrt(tl.sum(parts, 1) / K + eps)
    gate = _silu(_product(gates, row_factor, factor1, True, SCALE, dtype), dtype)
    up = _product(ups, row_factor, factor3, True, SCALE, dtype)
    mask = (outputs < N)[:, None] & (rows < M)[None, :]
    tl.store(out + rows[None, :] * N + outputs[:, None], (gate * up).to(dtype), mask=mask)


@triton.jit
def _embed_kernel(
    tokens, table, norm_weight, out, scaled, squares, images, K, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    if PDL:
        wait_for_inputs()
    columns = tl.arange(0, BLOCK)
    token = tl.load(tokens + row % images)
    h = tl.load(table + token * K + columns, mask=columns < K, other=0.0)
    weight = tl.load(norm_weight + columns, mask=columns < K, other=0.0).to(tl.float32)
    wide = h.to(tl.float32)
    tl.store(out + row * K + columns, h, mask=columns < K)
    tl.store(scaled + row * K + columns, (wide * weight).to(h.dtype), mask=columns < K)
    sums = tl.sum(tl.reshape(wide * wide, (BLOCK // _PART, _PART)), 1)
    parts, count = tl.arange(0, BLOCK // _PART), tl.cdiv(K, _PART)
    tl.store(squares + row * count + parts, sums, mask=parts < count)


@triton.jit
def _rms_norm_kernel(x, weight, out, K, eps, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * K + columns
    tile = tl.load(x + place, mask=columns < K, other=0.0)
    wide = tile.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)).to(tile.dtype).to(tl.float32)
    factor = tl.load(weight + columns, mask=columns < K, other=0.0).to(tl.float32)
    tl.store(out + place, (normed * factor).to(tile.dtype), mask=columns < K)


@triton.jit
def _silu_mul_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    tile = tl.load(gate + place, mask=mask, other=0.0)
    factor = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (_silu(tile.to(tl.float32), tile.dtype) * factor).to(tile.dtype), mask=mask)
