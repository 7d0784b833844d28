"""Products of at most 64 rows with a matrix read once, with RMSNorm, SwiGLU and the residual in the same kernel.

A decode step multiplies 2 to 64 rows by every matrix of the model: its time is that of reading the weights. A program
owns `block_n` outputs of all rows. Its warps split the inputs between them (`k_splits`): with few outputs there are few
programs, and each must keep many bytes on their way from memory. Roundings are those of the modules: `layers.RMSNorm`,
`F.linear`, `F.silu`, and a residual added after the product was rounded.

The order in which the products of a row are added depends on `block_k` and `k_splits` alone, which the defaults never
derive from the number of rows: a row has the same bits whatever rows are next to it. The weights stand on the left of
the matrix instruction. Its tile of 16 rows is then full however few activations there are, and `block_n` stays below
the 64 rows from which Triton may prefer an instruction of another internal precision (wgmma).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MULTIPROCESSORS = 132  # of an H100 or H200
_SHARED_BYTES = 200 * 1024  # of the 227 KiB a program may hold; the rest is for reductions and changes of layout
_BYTES_IN_FLIGHT = 64 * 1024  # weights a multiprocessor waits for: 4.8 TB/s * 1 us / 132 is 36 KB, and some slack
_STATISTICS_COLUMNS = tl.constexpr(256)  # a warp reads 256 columns of a row: the sum has one order for any M


@dataclass(frozen=True)
class Config:
    """Launch parameters of `linear` and `swiglu`; the sizes are powers of two.

    A program computes `block_n` outputs (16 or 32). A step of its loop reads `block_k` inputs, divided among `k_splits`
    groups of its `num_warps` warps (at least 16 inputs each); `num_stages` - 1 steps are in flight. `prefetch` asks for
    the weights in the L2 cache before the row statistics are computed. `pdl` launches the kernel while the one before
    it still runs (programmatic dependent launch, compute capability 9.0 and later): the prefetch then overlaps with it.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    k_splits: int
    prefetch: bool = True
    pdl: bool = False


def default_config(m: int, n: int, k: int, element_size: int, matrices: int = 1) -> Config:
    """The launch parameters for (m, k) activations of `element_size` bytes and `matrices` weights (n, k).

    `block_k` depends on the element size alone and `k_splits` is fixed: a row has the same bits for any `m`. A program
    has 16 outputs, which makes the most programs. It has 32, which halves the reads of activations, where every
    multiprocessor still has two of them, or where more than 16 rows make those reads outweigh the weights.
    """
    rows = _tile_rows(m)
    block_k = 128 if element_size == 4 else 256  # the float32 operands of a step are all in registers
    enough = 2 * _MULTIPROCESSORS if rows <= 16 else _MULTIPROCESSORS // 2
    block_n = 32 if element_size == 2 and n >= 32 * enough else 16
    weight_bytes = matrices * block_n * block_k * element_size
    row_bytes = rows * block_k * element_size
    neighbours = min(4, MAX_ROWS // rows, triton.cdiv(triton.cdiv(n, block_n), _MULTIPROCESSORS))  # registers allow
    wanted = max(2, triton.cdiv(_BYTES_IN_FLIGHT, neighbours * weight_bytes))
    fitting = (_SHARED_BYTES - row_bytes) // (weight_bytes + row_bytes)
    in_flight = max(1, min(wanted, fitting, triton.cdiv(k, block_k)))
    return Config(block_n, block_k, num_warps=8, num_stages=in_flight + 1, k_splits=8)


def candidate_configs(m: int, n: int, k: int, matrices: int = 1) -> list[Config]:
    """At most eight launch parameters worth timing for 2-byte operands, the default first.

    `m`, `n`, `k` and `matrices` are those of `default_config`. Results of different `block_k` or `k_splits` differ in
    their last bits, so a choice among them must not depend on `m`.
    """
    default = default_config(m, n, k, 2, matrices)
    others = [
        replace(default, prefetch=False),
        replace(default, block_n=48 - default.block_n),  # 16 for 32, 32 for 16
        replace(default, num_stages=max(2, default.num_stages - 2)),
        replace(default, num_warps=4, k_splits=4),
        Config(16, 512, 8, 3, 8),
        Config(32, 512, 8, 3, 8),
        Config(16, 128, 1, 5, 1),
    ]
    rows = _tile_rows(m)

    def fits(c: Config) -> bool:
        """Shared memory holds it, and registers the share of few warps in many rows."""
        shared_bytes = 2 * c.block_k * ((rows + matrices * c.block_n) * (c.num_stages - 1) + rows)
        return shared_bytes <= _SHARED_BYTES and (c.num_warps == 8 or rows <= 16)

    return [default, *(c for c in others if c != default and fits(c))]


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """rms_norm(x) @ weight.T * scale + residual, of shape (M, N); each of the norm, scale and residual is optional.

    `x` (M, K) is bfloat16, float16 or float32, M at most 64 and K a multiple of 8; `norm_weight` (K,) and `residual`
    (M, N) have its dtype. `weight` (N, K) has it too, or is int8 with a `scale` (N,) of that dtype or float32. `out`
    (M, N) may be `residual` itself, but must not overlap `x`. All tensors are contiguous. ValueError for any other.
    """
    m, n, k = _check_operands(x, [weight], [scale], norm_weight)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
    for name, tensor in (("residual", residual), ("out", out)):
        _check_tensor(name, tensor, (m, n), (x.dtype,))
    config = config or default_config(m, n, k, x.element_size())
    _linear_kernel[(triton.cdiv(n, config.block_n),)](
        x, weight, norm_weight, residual, scale, out, m, n, k, eps,
        NORM=norm_weight is not None, RESIDUAL=residual is not None, SCALE=scale is not None,
        **_launch_options(config, x, k),
    )  # fmt: skip
    return out


def swiglu(
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    *,
    norm_weight: Tensor,
    eps: float = 1e-5,
    scale1: Tensor | None = None,
    scale3: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """silu(y @ w1.T * scale1) * (y @ w3.T * scale3) with y = rms_norm(x), of shape (M, H).

    `w1` and `w3` (H, K) have one dtype; `scale1` and `scale3` (H,) come together or not at all. The rest is as for
    `linear`; `out` (M, H) must not overlap `x`.
    """
    m, n, k = _check_operands(x, [w1, w3], [scale1, scale3], norm_weight)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
    _check_tensor("out", out, (m, n), (x.dtype,))
    config = config or default_config(m, n, k, x.element_size(), matrices=2)
    _swiglu_kernel[(triton.cdiv(n, config.block_n),)](
        x, w1, w3, norm_weight, scale1, scale3, out, m, n, k, eps,
        SCALE=scale1 is not None, **_launch_options(config, x, k),
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
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], norm_weight: Tensor | None
) -> tuple[int, int, int]:
    """M, N and K of `x` (M, K) and `weights` (N, K); ValueError for what the kernels cannot take."""
    if x.dim() != 2 or weights[0].dim() != 2:
        raise ValueError(f"x and weight have two dimensions, not {x.dim()} and {weights[0].dim()}")
    (m, k), n = x.shape, weights[0].shape[0]
    if not 1 <= m <= MAX_ROWS or k % 8 or not k or not n:
        raise ValueError(f"x {tuple(x.shape)} has 1 to {MAX_ROWS} rows and a multiple of 8 columns")
    _check_tensor("x", x, (m, k), _DTYPES)
    _check_tensor("norm_weight", norm_weight, (k,), (x.dtype,))
    quantized = weights[0].dtype == torch.int8
    for weight, scale in zip(weights, scales):
        _check_tensor("weight", weight, (n, k), (torch.int8 if quantized else x.dtype,))
        _check_tensor("scale", scale, (n,), (x.dtype, torch.float32))
        if quantized == (scale is None):
            raise ValueError("int8 weights need a scale, and other weights take none")
    return m, n, k


def _launch_options(config: Config, x: Tensor, k: int) -> dict[str, int | bool]:
    """What both kernels take from `config`. Only a GPU has a cache to prefetch to, and launches that may overlap."""
    return {
        "EVEN": k % config.block_k == 0,
        "PREFETCH": config.prefetch and x.is_cuda,
        "PDL": config.pdl and x.is_cuda,
        "ROWS": _tile_rows(x.shape[0]),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLITS": config.k_splits,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "launch_pdl": config.pdl,
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
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [weight + outputs[:, None] * K + columns[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _split_inputs(BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """Inputs of one step (SPLITS, BLOCK_K / SPLITS), counted from its first: each split has neighbouring ones."""
    width: tl.constexpr = BLOCK_K // SPLITS
    return tl.arange(0, SPLITS)[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def _inverse_rms(x, rows, M, K, eps, ROWS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row, float32 (ROWS,)."""
    squares = tl.zeros((ROWS, 32), tl.float32)
    columns = tl.arange(0, _STATISTICS_COLUMNS)
    for start in tl.range(0, K, _STATISTICS_COLUMNS, loop_unroll_factor=64 // ROWS):
        mask = (rows[:, None] < M) & (start + columns < K)[None, :]
        wide = tl.load(x + rows[:, None] * K + (start + columns)[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(tl.reshape(wide * wide, (ROWS, 32, _STATISTICS_COLUMNS // 32)), 2)
    return tl.rsqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def _wait_for_inputs():
    """Wait for the kernel before this one, then let the one after it be launched."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _load_rows(x, norm_weight, inverse_rms, rows, k, M, K, NORM: tl.constexpr, EVEN: tl.constexpr):
    """The activations (splits, ROWS, inputs of a split) at the inputs `k` (splits, inputs), normalised and rounded."""
    mask = (rows < M)[None, :, None]
    if not EVEN:
        mask = mask & (k < K)[:, None, :]
    tile = tl.load(x + rows[None, :, None] * K + k[:, None, :], mask=mask, other=0.0)
    if NORM:
        if EVEN:
            weight = tl.load(norm_weight + k)
        else:
            weight = tl.load(norm_weight + k, mask=k < K, other=0.0)
        normed = (tile.to(tl.float32) * inverse_rms[None, :, None]).to(tile.dtype)
        tile = (normed.to(tl.float32) * weight[:, None, :].to(tl.float32)).to(tile.dtype)
    return tile


@triton.jit
def _load_weights(weight, outputs, k, N, K, EVEN: tl.constexpr):
    """The weights (splits, outputs, inputs of a split)."""
    mask = (outputs < N)[None, :, None]
    if not EVEN:
        mask = mask & (k < K)[:, None, :]
    pointers = weight + outputs[None, :, None].to(tl.int64) * K + k[:, None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _add_splits(sums):
    """The sum over the first axis, of length 1 to 16, by halves: tl.sum would take its order from ROWS in float32."""
    for _ in tl.static_range(4):
        if sums.shape[0] > 1:
            halves = tl.reshape(sums, (2, sums.shape[0] // 2, sums.shape[1], sums.shape[2]))
            first, second = tl.split(tl.permute(halves, (1, 2, 3, 0)))
            sums = first + second
    return tl.reshape(sums, (sums.shape[1], sums.shape[2]))


@triton.jit
def _product(sums, factor, SCALE: tl.constexpr, dtype: tl.constexpr):
    """Sums of the splits to products (outputs, ROWS) in float32, holding values rounded to `dtype` as F.linear's."""
    product = _add_splits(sums).to(dtype).to(tl.float32)
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
    x, weight, norm_weight, residual, scale, out, M, N, K, eps,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    rows, outputs = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = _split_inputs(BLOCK_K, SPLITS)
    if PREFETCH:
        _prefetch(weight, N, K, BLOCK_N)
    if PDL:
        _wait_for_inputs()
    inverse_rms = rows
    if NORM:
        inverse_rms = _inverse_rms(x, rows, M, K, eps, ROWS)
    factor = _load_scale(scale, outputs, N, SCALE)
    mask = (outputs < N)[:, None] & (rows < M)[None, :]
    place = rows[None, :] * N + outputs[:, None]
    if RESIDUAL:  # loaded before the products, which hide its latency
        addend = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros((SPLITS, BLOCK_N, ROWS), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + within
        tile = _load_rows(x, norm_weight, inverse_rms, rows, k, M, K, NORM, EVEN).permute(0, 2, 1)
        weights = _load_weights(weight, outputs, k, N, K, EVEN).to(dtype)
        sums = tl.dot(weights, tile, sums, input_precision="ieee")
    product = _product(sums, factor, SCALE, dtype)
    if RESIDUAL:
        product += addend
    tl.store(out + place, product.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _swiglu_kernel(
    x, w1, w3, norm_weight, scale1, scale3, out, M, N, K, eps,
    SCALE: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    rows, outputs = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = _split_inputs(BLOCK_K, SPLITS)
    if PREFETCH:
        _prefetch(w1, N, K, BLOCK_N)
        _prefetch(w3, N, K, BLOCK_N)
    if PDL:
        _wait_for_inputs()
    inverse_rms = _inverse_rms(x, rows, M, K, eps, ROWS)
    factor1 = _load_scale(scale1, outputs, N, SCALE)
    factor3 = _load_scale(scale3, outputs, N, SCALE)
    gates = tl.zeros((SPLITS, BLOCK_N, ROWS), tl.float32)
    ups = tl.zeros((SPLITS, BLOCK_N, ROWS), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + within
        tile = _load_rows(x, norm_weight, inverse_rms, rows, k, M, K, True, EVEN).permute(0, 2, 1)
        gates = tl.dot(_load_weights(w1, outputs, k, N, K, EVEN).to(dtype), tile, gates, input_precision="ieee")
        ups = tl.dot(_load_weights(w3, outputs, k, N, K, EVEN).to(dtype), tile, ups, input_precision="ieee")
    gate = _silu(_product(gates, factor1, SCALE, dtype), dtype)
    up = _product(ups, factor3, SCALE, dtype)
    mask = (outputs < N)[:, None] & (rows < M)[None, :]
    tl.store(out + rows[None, :] * N + outputs[:, None], (gate * up).to(dtype), mask=mask)


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
