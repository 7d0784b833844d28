"""The skinny matrix products against the modules they stand for.

The `check_*` functions run interpreted on the CPU, where Triton's bfloat16 truncates and is left out, and as they are
on a GPU (`check_linear("cuda")`), with the shapes of published models.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.engine.kernels.linear import candidate_configs, default_config, linear, rms_norm, silu_mul, swiglu
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


def _assert_close(got: Tensor, eager: Tensor, exact: Tensor, slack: float = 1.0) -> None:
    """Within `slack` times the rounding of the float64 result; the modules' result but for the order of its sums."""
    assert got.dtype == eager.dtype
    assert got.shape == eager.shape
    dtype, got, eager = got.dtype, got.double(), eager.double()
    assert (got - exact).norm() < slack * EXACT[dtype] * exact.norm(), (dtype, got.shape)
    assert (got - eager).norm() < slack * EAGER[dtype] * eager.norm(), (dtype, got.shape)
    if dtype != torch.float32:  # a rounding left out or misplaced changes a quarter of all results
        assert (got == eager).double().mean() > 0.9, (dtype, got.shape)


def _linear_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    """The same from the modules, in the dtype of `x`; sums in float32, which a GPU's F.linear may reduce in halves."""
    x = x if norm_weight is None else _norm(norm_weight)(x)
    product = F.linear(x.float(), weight.float()).to(x.dtype)
    product = product if scale is None else (product * scale).to(x.dtype)
    return product if residual is None else residual + product


def _check_linear(m: int, n: int, k: int, dtype: torch.dtype, device: str, norm: bool, add: bool) -> None:
    x = _normal((m, k), dtype, device, 0, 0.003 if norm else 1.0)  # so small that eps is half of the norm's root
    weight = _normal((n, k), dtype, device, 1, k**-0.5)
    norm_weight = 1 + _normal((k,), dtype, device, 2, 0.2) if norm else None
    residual = _normal((m, n), dtype, device, 3) if add else None
    got = linear(x, weight, norm_weight=norm_weight, eps=EPS, residual=residual)
    operands = [x, weight, norm_weight, residual, None]
    wide = [None if t is None else t.double() for t in operands]
    _assert_close(got, _linear_reference(*operands), _exact_linear(*wide))


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
        _check_linear(m, n, k, dtype, device, norm=False, add=m % 2 == 0)
        _check_linear(m, n, k, dtype, device, norm=True, add=m % 2 == 1)


def check_int8(device: str = "cpu") -> None:
    for (m, n, k), dtype in itertools.product(_cases(device), _dtypes(device)):
        x, norm_weight = _normal((m, k), dtype, device, 0), 1 + _normal((k,), dtype, device, 1, 0.2)
        weight, scale = quantize_rows(_normal((n, k), torch.float32, device, 2, k**-0.5))
        residual = _normal((m, n), dtype, device, 3)
        scale = scale if m == 16 else scale.to(dtype)
        operands = [x, weight, norm_weight, residual, scale]
        got = linear(x, weight, norm_weight=norm_weight, eps=EPS, residual=residual, scale=scale)
        _assert_close(got, _linear_reference(*operands), _exact_linear(*[t.double() for t in operands]))


def check_residual_in_place(device: str = "cpu") -> None:
    for dtype in _dtypes(device):
        x, weight = _normal((17, 264), dtype, device, 0), _normal((48, 264), dtype, device, 1, 0.1)
        stream = _normal((17, 48), dtype, device, 2)
        expected = linear(x, weight, residual=stream.clone())
        assert linear(x, weight, residual=stream, out=stream) is stream
        assert torch.equal(stream, expected)


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
    got = swiglu(x, w1, w3, norm_weight=norm_weight, eps=EPS, scale1=scale1, scale3=scale3)
    gate = _linear_reference(x, w1, norm_weight, None, scale1)
    eager = F.silu(gate) * _linear_reference(x, w3, norm_weight, None, scale3)
    scales = [None if s is None else s.double() for s in (scale1, scale3)]
    exact_gate = _exact_linear(x.double(), w1.double(), norm_weight.double(), None, scales[0])
    exact_up = _exact_linear(x.double(), w3.double(), norm_weight.double(), None, scales[1])
    _assert_close(got, eager, F.silu(exact_gate) * exact_up, slack=2.5)  # a product of two rounded products


def check_rows_do_not_depend_on_their_number(device: str = "cpu") -> None:
    n, k = (40, 528) if device == "cpu" else (3072, 2816)
    for dtype, quantized in itertools.product(_dtypes(device), (False, True)):
        x, norm_weight = _normal((64, k), dtype, device, 0), 1 + _normal((k,), dtype, device, 1, 0.2)
        weight, scale = _normal((n, k), dtype, device, 2, 0.1), None
        if quantized:
            weight, scale = quantize_rows(weight)
        product = linear(x, weight, norm_weight=norm_weight, scale=scale)
        gated = swiglu(x, weight, weight, norm_weight=norm_weight, scale1=scale, scale3=scale)
        normed = rms_norm(x, norm_weight)
        for rows in (slice(0, 1), slice(5, 7), slice(3, 11), slice(9, 25), slice(0, 17), slice(31, 63)):
            some = x[rows].contiguous()
            assert torch.equal(linear(some, weight, norm_weight=norm_weight, scale=scale), product[rows])
            alone = swiglu(some, weight, weight, norm_weight=norm_weight, scale1=scale, scale3=scale)
            assert torch.equal(alone, gated[rows])
            assert torch.equal(rms_norm(some, norm_weight), normed[rows])


def check_candidate_configs(device: str = "cpu") -> None:
    """Every candidate, and a dependent launch, gives the product; uneven sizes in outputs and inputs."""
    dtype = _dtypes(device)[-1]
    for m, n, k in ((2, 40, 264), (17, 96, 1032)):
        x, norm_weight = _normal((m, k), dtype, device, 0), 1 + _normal((k,), dtype, device, 1, 0.2)
        weight = _normal((n, k), dtype, device, 2, 0.1)
        eager = _linear_reference(x, weight, norm_weight, None, None)
        exact = _exact_linear(x.double(), weight.double(), norm_weight.double(), None, None)
        for config in [*candidate_configs(m, n, k), replace(default_config(m, n, k, 2), pdl=True)]:
            _assert_close(linear(x, weight, norm_weight=norm_weight, eps=EPS, config=config), eager, exact)


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
        torch.testing.assert_close(got, expected)
        if dtype != torch.float32:
            assert (got == expected).double().mean() > 0.99
        assert torch.equal(silu_mul(gate, up, out=up), got)


def _check_extreme_values(device: str) -> None:
    """A gate far below zero gives 0 times the rest, not NaN; rows of zeros stay zeros."""
    gate = torch.tensor([-200.0, -1e4, 1e4], device=device)
    assert silu_mul(gate, torch.ones_like(gate)).tolist() == [0.0, 0.0, 1e4]
    zeros, ones = torch.zeros(2, 16, device=device), torch.ones(16, device=device)
    assert not linear(zeros, torch.ones(16, 16, device=device), norm_weight=ones).any()


def test_linear() -> None:
    run_interpreted(__name__, "check_linear")


def test_int8() -> None:
    run_interpreted(__name__, "check_int8")


def test_residual_in_place() -> None:
    run_interpreted(__name__, "check_residual_in_place")


def test_swiglu() -> None:
    run_interpreted(__name__, "check_swiglu")


def test_rows_do_not_depend_on_their_number() -> None:
    run_interpreted(__name__, "check_rows_do_not_depend_on_their_number")


def test_candidate_configs() -> None:
    run_interpreted(__name__, "check_candidate_configs")


def test_elementwise() -> None:
    run_interpreted(__name__, "check_elementwise")


def test_unfit_operands() -> None:
    x, weight, norm_weight = torch.zeros(2, 16), torch.zeros(4, 16), torch.zeros(16)
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
        "norm_weight is": lambda: linear(x, weight, norm_weight=torch.zeros(4)),
        "residual is": lambda: linear(x, weight, residual=torch.zeros(4)),
        "out is": lambda: linear(x, weight, out=torch.zeros(2, 4).half()),
        "x is not contiguous": lambda: linear(torch.zeros(16, 2).T, weight),
        "x is torch.float64": lambda: linear(x.double(), weight.double()),
        "weight is torch.float32 \\(3": lambda: swiglu(x, weight, weight[:3], norm_weight=norm_weight),
        "weight is torch.int8": lambda: swiglu(x, weight, quantized, norm_weight=norm_weight),
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
