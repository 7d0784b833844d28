"""The skinny matrix products against the modules they stand for.

The `check_*` functions run interpreted on the CPU, where Triton's bfloat16 truncates and is left out, and as they are
on a GPU (`check_linear("cuda")`), with the shapes of published models.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.engine.kernels.linear import (
    Stream,
    add_linear,
    candidate_configs,
    default_config,
    embed,
    linear,
    rms_norm,
    silu_mul,
    swiglu,
)
from autoregressive.engine.packing import quantize_rows
from autoregressive.models.layers import RMSNorm
from tests.autoregressive.engine.kernels.interpreted import run_interpreted

EPS = 1e-5
# ||difference|| / ||reference||: to the float64 result, and to the modules' result in the same dtype.
EXACT = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
EAGER = {torch.float32: 5e-6, torch.float16: 2e-4, torch.bfloat16: 1.5e-3}
SHARED_BYTES = 227 * 1024  # of one program on an H100


def _dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16] + [torch.bfloat16] * (device != "cpu")


def _cases(device: str) -> list[tuple[int, int, int]]:
    """(rows, outputs, inputs): less than a block, exactly one, several and a part; every tile of rows."""
    tiny = [(1, 37, 40), (2, 16, 256), (16, 40, 264), (17, 80, 528), (64, 16, 40)]
    published = [(2, 1024, 2816), (16, 3072, 1024), (64, 16384, 1024), (33, 9600, 3200)]
    return tiny if device == "cpu" else [*tiny, *published]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def _norm(weight: Tensor) -> RMSNorm:
    module = RMSNorm(len(weight), eps=EPS).to(weight.device, weight.dtype)
    module.weight.data.copy_(weight)
    return module.requires_grad_(False)


def _assert_close(got: Tensor, eager: Tensor, exact: Tensor, slack: float = 1.0, same_roundings: bool = True) -> None:
    """Within `slack` times the rounding of the float64 result; the modules' result but for the order of its sums.

    Without `same_roundings` (a norm rounds before its scale here, after it in the module) it holds less tightly.
    """
    assert got.dtype == eager.dtype
    assert got.shape == eager.shape
    dtype, got, eager = got.dtype, got.double(), eager.double()
    assert (got - exact).norm() < slack * EXACT[dtype] * exact.norm(), (dtype, got.shape)
    if dtype != torch.float32 and not same_roundings:
        assert (got - eager).norm() < slack * 2 * EXACT[dtype] * eager.norm(), (dtype, got.shape)
        return
    few = 4.0 if got.numel() < 100 else 1.0  # one other rounding shows in the norm of few numbers
    assert (got - eager).norm() < few * slack * EAGER[dtype] * eager.norm(), (dtype, got.shape)
    if dtype != torch.float32:  # a rounding left out or misplaced changes a quarter of all results
        assert (got == eager).double().mean() > 0.9, (dtype, got.shape)


def _stream(x: Tensor, norm_weight: Tensor) -> Stream:
    """The stream `x` before the norm of `norm_weight`."""
    return embed(torch.arange(len(x), device=x.device), x, norm_weight)


def _linear_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    """The same from the modules, in the dtype of `x`; sums in float32, which a GPU's F.linear may reduce in halves."""
    x = x if norm_weight is None else _norm(norm_weight)(x)
    product = F.linear(x.float(), weight.float()).to(x.dtype)
    product = product if scale is None else (product * scale).to(x.dtype)
    return product if residual is None else residual + product


def _check_linear(m: int, n: int, k: int, dtype: torch.dtype, device: str, norm: bool) -> None:
    x = _normal((m, k), dtype, device, 0, 0.003 if norm else 1.0)  # so small that eps is half of the norm's root
    weight = _normal((n, k), dtype, device, 1, k**-0.5)
    norm_weight = 1 + _normal((k,), dtype, device, 2, 0.2) if norm else None
    got = linear(_stream(x, norm_weight) if norm else x, weight, eps=EPS)
    operands = [x, weight, norm_weight, None, None]
    wide = [None if t is None else t.double() for t in operands]
    _assert_close(got, _linear_reference(*operands), _exact_linear(*wide), same_roundings=not norm)


def _check_add_linear(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    """The new stream: the sum, the sum times the weight of the next norm, its squares in parts of 16."""
    x, weight = _normal((m, k), dtype, device, 0), _normal((n, k), dtype, device, 1, k**-0.5)
    residual, next_norm = _normal((m, n), dtype, device, 3), 1 + _normal((n,), dtype, device, 4, 0.2)
    got = add_linear(x, weight, residual, next_norm)
    operands = [x, weight, None, residual, None]
    wide = [None if t is None else t.double() for t in operands]
    _assert_close(got.h, _linear_reference(*operands), _exact_linear(*wide))
    _check_stream(got, next_norm)


def _check_stream(stream: Stream, norm_weight: Tensor) -> None:
    """That the other parts of a stream belong to its `h`."""
    torch.testing.assert_close(stream.scaled, stream.h * norm_weight, rtol=0, atol=0)
    columns = stream.h.shape[1]
    squares = F.pad(stream.h.double(), (0, -columns % 16)).square().unflatten(1, (-1, 16)).sum(dim=2)
    torch.testing.assert_close(stream.squares, squares.float(), rtol=1e-6, atol=1e-12)


def _exact_linear(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    """The same in float64 throughout: the module's norm would fall back to float32."""
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * norm_weight
    product = x @ weight.T
    product = product if scale is None else product * scale
    return product if residual is None else product + residual


def check_linear(device: str = "cpu") -> None:
    for (m, n, k), dtype in itertools.product(_cases(device), _dtypes(device)):
        _check_linear(m, n, k, dtype, device, norm=False)
        _check_linear(m, n, k, dtype, device, norm=True)


def check_add_linear(device: str = "cpu") -> None:
    for (m, n, k), dtype in itertools.product(_cases(device), _dtypes(device)):
        _check_add_linear(m, n, k, dtype, device)


def check_embed(device: str = "cpu") -> None:
    """Rows of a table, for conditional and unconditional rows at once."""
    for dtype, dim in itertools.product(_dtypes(device), (24, 1280)):
        table, norm_weight = _normal((50, dim), dtype, device, 0), 1 + _normal((dim,), dtype, device, 1, 0.2)
        tokens = torch.tensor([7, 0, 49], device=device)
        stream = embed(tokens, table, norm_weight, copies=2)
        assert torch.equal(stream.h, table[torch.cat([tokens, tokens])])
        _check_stream(stream, norm_weight)


def check_int8(device: str = "cpu") -> None:
    for (m, n, k), dtype in itertools.product(_cases(device), _dtypes(device)):
        x, norm_weight = _normal((m, k), dtype, device, 0), 1 + _normal((k,), dtype, device, 1, 0.2)
        weight, scale = quantize_rows(_normal((n, k), torch.float32, device, 2, k**-0.5))
        residual, next_norm = _normal((m, n), dtype, device, 3), 1 + _normal((n,), dtype, device, 4, 0.2)
        scale = scale if m == 16 else scale.to(dtype)
        operands = [x, weight, norm_weight, None, scale]
        got = linear(_stream(x, norm_weight), weight, eps=EPS, scale=scale)
        exact = _exact_linear(*[None if t is None else t.double() for t in operands])
        _assert_close(got, _linear_reference(*operands), exact, same_roundings=False)
        operands = [x, weight, None, residual, scale]
        got = add_linear(x, weight, residual, next_norm, scale=scale)
        exact = _exact_linear(*[None if t is None else t.double() for t in operands])
        _assert_close(got.h, _linear_reference(*operands), exact)
        _check_stream(got, next_norm)


def check_swiglu(device: str = "cpu") -> None:
    for (m, n, k), dtype in itertools.product(_cases(device), _dtypes(device)):
        x, norm_weight = _normal((m, k), dtype, device, 0, 3.0), 1 + _normal((k,), dtype, device, 1, 0.2)
        w1, w3 = (_normal((n, k), torch.float32, device, seed, 2 * k**-0.5) for seed in (2, 3))
        _check_swiglu(x, norm_weight, w1.to(dtype), w3.to(dtype), None, None)
        (q1, scale1), (q3, scale3) = quantize_rows(w1), quantize_rows(w3)
        _check_swiglu(x, norm_weight, q1, q3, scale1.to(dtype), scale3.to(dtype))


def _check_swiglu(
    x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, scale1: Tensor | None, scale3: Tensor | None
) -> None:
    got = swiglu(_stream(x, norm_weight), w1, w3, eps=EPS, scale1=scale1, scale3=scale3)
    gate = _linear_reference(x, w1, norm_weight, None, scale1)
    eager = F.silu(gate) * _linear_reference(x, w3, norm_weight, None, scale3)
    scales = [None if s is None else s.double() for s in (scale1, scale3)]
    exact_gate = _exact_linear(x.double(), w1.double(), norm_weight.double(), None, scales[0])
    exact_up = _exact_linear(x.double(), w3.double(), norm_weight.double(), None, scales[1])
    _assert_close(got, eager, F.silu(exact_gate) * exact_up, slack=2.5, same_roundings=False)


def check_rows_do_not_depend_on_their_number(device: str = "cpu") -> None:
    n, k = (40, 528) if device == "cpu" else (3072, 2816)
    for dtype, quantized in itertools.product(_dtypes(device), (False, True)):
        x, norm_weight = _normal((64, k), dtype, device, 0), 1 + _normal((k,), dtype, device, 1, 0.2)
        weight, scale = _normal((n, k), dtype, device, 2, 0.1), None
        if quantized:
            weight, scale = quantize_rows(weight)
        stream, normed = _stream(x, norm_weight), rms_norm(x, norm_weight)
        product = linear(stream, weight, scale=scale)
        gated = swiglu(stream, weight, weight, scale1=scale, scale3=scale)
        added = add_linear(x, weight, product, weight[:, 0].to(dtype).contiguous(), scale=scale)
        for rows in (slice(0, 1), slice(5, 7), slice(3, 11), slice(9, 25), slice(0, 17), slice(31, 63)):
            some = x[rows].contiguous()
            alone = _stream(some, norm_weight)
            assert torch.equal(linear(alone, weight, scale=scale), product[rows])
            assert torch.equal(swiglu(alone, weight, weight, scale1=scale, scale3=scale), gated[rows])
            assert torch.equal(rms_norm(some, norm_weight), normed[rows])
            fewer = product[rows].contiguous(), weight[:, 0].to(dtype).contiguous()
            for part, whole in zip(add_linear(some, weight, *fewer, scale=scale), added):
                assert torch.equal(part, whole[rows])


def check_candidate_configs(device: str = "cpu") -> None:
    """Every candidate, and a dependent launch, gives the product; uneven sizes in outputs and inputs."""
    dtype = _dtypes(device)[-1]
    for m, n, k in ((2, 40, 264), (17, 96, 1032)):
        x, norm_weight = _normal((m, k), dtype, device, 0), 1 + _normal((k,), dtype, device, 1, 0.2)
        weight = _normal((n, k), dtype, device, 2, 0.1)
        eager = _linear_reference(x, weight, norm_weight, None, None)
        exact = _exact_linear(x.double(), weight.double(), norm_weight.double(), None, None)
        for config in candidate_configs(m, n, k):
            got = linear(_stream(x, norm_weight), weight, eps=EPS, config=config)
            _assert_close(got, eager, exact, same_roundings=False)


def check_elementwise(device: str = "cpu") -> None:
    _check_rms_norm(device)
    _check_silu_mul(device)
    _check_extreme_values(device)


def _check_rms_norm(device: str) -> None:
    for dtype, k, shape in itertools.product(_dtypes(device), (24, 1030), ((3,), (2, 35))):
        x, weight = _normal((*shape, k), dtype, device, 0, 5.0), 1 + _normal((k,), dtype, device, 1, 0.2)
        expected = _norm(weight)(x)
        got = rms_norm(x, weight, EPS)
        torch.testing.assert_close(got, expected)
        if dtype != torch.float32:
            assert (got == expected).double().mean() > 0.995  # the sums' order shows in few roundings
        assert torch.equal(rms_norm(x, weight, EPS, out=x), got)


def _check_silu_mul(device: str) -> None:
    for dtype in _dtypes(device):
        gate, up = (_normal((33, 100), dtype, device, seed, 4.0) for seed in (0, 1))
        expected = F.silu(gate) * up
        got = silu_mul(gate, up)
        torch.testing.assert_close(got, expected, rtol=1.6e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-5)
        if dtype != torch.float32:  # the exponential's last bit shows in few roundings
            assert (got == expected).double().mean() > 0.99
        assert torch.equal(silu_mul(gate, up, out=up), got)


def _check_extreme_values(device: str) -> None:
    """A gate far below zero gives 0 times the rest, not NaN; rows of zeros stay zeros."""
    gate = torch.tensor([-200.0, -1e4, 1e4], device=device)
    assert silu_mul(gate, torch.ones_like(gate)).tolist() == [0.0, 0.0, 1e4]
    zeros, ones = torch.zeros(2, 16, device=device), torch.ones(16, device=device)
    assert not linear(_stream(zeros, ones), torch.ones(16, 16, device=device)).any()


def test_linear() -> None:
    run_interpreted(__name__, "check_linear")


def test_int8() -> None:
    run_interpreted(__name__, "check_int8")


def test_add_linear() -> None:
    run_interpreted(__name__, "check_add_linear")


def test_embed() -> None:
    run_interpreted(__name__, "check_embed")


def test_swiglu() -> None:
    run_interpreted(__name__, "check_swiglu")


def test_rows_do_not_depend_on_their_number() -> None:
    run_interpreted(__name__, "check_rows_do_not_depend_on_their_number")


def test_candidate_configs() -> None:
    run_interpreted(__name__, "check_candidate_configs")


def test_elementwise() -> None:
    run_interpreted(__name__, "check_elementwise")


def test_unfit_operands() -> None:
    x, weight, residual = torch.zeros(2, 16), torch.zeros(4, 16), torch.zeros(2, 4)
    stream = Stream(x, x, torch.zeros(2, 1))
    quantized, scale = weight.to(torch.int8), torch.ones(4)
    unfit = {
        "1 to 64 rows": lambda: linear(torch.zeros(65, 16), weight),
        "multiple of 8": lambda: linear(torch.zeros(2, 12), torch.zeros(4, 12)),
        "two dimensions": lambda: linear(x[None], weight),
        "weight is": lambda: linear(x, torch.zeros(4, 24)),
        "weight is torch.float16": lambda: linear(x, weight.half()),
        "int8 weights need a scale": lambda: linear(x, quantized),
        "other weights take none": lambda: linear(x, weight, scale=scale),
        "scale is": lambda: linear(x, quantized, scale=torch.ones(5)),
        "squares is": lambda: linear(Stream(x, x, torch.zeros(2, 2)), weight),
        "residual is": lambda: add_linear(x, weight, torch.zeros(4), torch.zeros(4)),
        "norm_weight is": lambda: add_linear(x, weight, residual, torch.zeros(5)),
        "tokens is": lambda: embed(torch.zeros(2), weight, torch.zeros(16)),
        "x is not contiguous": lambda: linear(torch.zeros(16, 2).T, weight),
        "x is torch.float64": lambda: linear(x.double(), weight.double()),
        "weight is torch.float32 \\(3": lambda: swiglu(stream, weight, weight[:3]),
        "weight is torch.int8": lambda: swiglu(stream, weight, quantized),
        "weight is torch.float32 \\(4,": lambda: rms_norm(x, torch.zeros(4)),
        "up is": lambda: silu_mul(x, weight),
    }
    for message, call in unfit.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("n, k", [(768, 768), (1024, 2816), (3072, 1024), (16384, 1024), (8704, 3200)])
def test_default_config_adds_in_one_order_and_fits(n: int, k: int, element_size: int) -> None:
    configs = {m: default_config(m, n, k, element_size, matrices=2) for m in (1, 2, 8, 16, 32, 64)}
    assert len({(c.block_k, c.k_splits) for c in configs.values()}) == 1
    for m, c in configs.items():
        loaded = (max(8, m) + 2 * c.block_n) * c.block_k * element_size * (c.num_stages - 1)
        assert loaded <= SHARED_BYTES
        assert c.num_stages >= 2


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("m", [2, 16, 64])
def test_candidate_configs_are_few_and_distinct(m: int, matrices: int) -> None:
    candidates = candidate_configs(m, 3072, 1024, matrices)
    assert candidates[0] == default_config(m, 3072, 1024, 2, matrices)
    assert 4 <= len(set(candidates)) == len(candidates) <= 8
