"""The fused attention of a decode step against rotary embedding, cache update and attention of plain PyTorch.

The check functions run interpreted on the CPU, and compiled where they are called with a GPU.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.cache import EIGHT_BITS, KVCache, QuantizedKVCache
from autoregressive.models.config import ModelArgs
from autoregressive.models.layers import Attention
from autoregressive.models.rope import apply_rotary_emb, precompute_freqs_cis_2d
from tests.autoregressive.engine.kernels.interpreted import run_interpreted

pytest.importorskip("triton")  # PyTorch for CPUs comes without it
from autoregressive.engine.kernels.attention import decode_attention

_CONDITION = 3  # positions of the condition, whose rows of the rope table are zeros
_POSITIONS = 210
_RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # a step of the half-width formats


@dataclass
class Step:
    """The inputs of one decode step; `storage` (2, rows, heads, positions, stride) holds padded keys and values."""

    qkv: Tensor
    rope_table: Tensor
    storage: Tensor
    n_head: int
    head_dim: int

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        """The key and the value cache, views of the storage."""
        return self.storage[0, ..., : self.head_dim], self.storage[1, ..., : self.head_dim]

    def run(self, position: int, first_key: Tensor | None = None, rows: int | None = None) -> Tensor:
        """What the kernel returns for the first `rows` rows (None: all); the caches change."""
        qkv = self.qkv[:rows]
        out = torch.full_like(qkv[:, : self.n_head * self.head_dim], float("nan")).contiguous()
        returned = decode_attention(
            qkv, self.rope_table, torch.tensor([position], device=qkv.device), *self.caches,
            n_head=self.n_head, first_key=first_key, out=out,
        )  # fmt: skip
        assert returned is out
        return out


def _step(
    device: str, dtype: torch.dtype, head_dim: int, stride: int = 0, heads: int = 2, kv_heads: int = 2, rows: int = 2
) -> Step:
    """Random inputs; the caches have one row more than qkv. `stride` 0 means no padding."""
    generator = torch.Generator().manual_seed(7)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=generator)
    storage = torch.zeros(2, rows + 1, kv_heads, _POSITIONS, stride or head_dim)
    storage[..., :head_dim] = torch.randn(*storage.shape[:-1], head_dim, generator=generator)
    table = precompute_freqs_cis_2d(15, head_dim, cls_token_num=_CONDITION, device=device)
    return Step(qkv.to(device, dtype), table, storage.to(device, dtype), heads, head_dim)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 `x` in another format; Triton's interpreter cuts off where bfloat16 is rounded on a GPU."""
    if dtype == torch.bfloat16 and x.device.type == "cpu":
        x = (x.view(torch.int32) & -(2**16)).view(torch.float32)
    return x.to(dtype)


def _expected(step: Step, position: int, first_key: list[int]) -> tuple[Tensor, Tensor]:
    """The output (rows, heads * head_dim) in float64, and the storage after the step."""
    storage, rows = step.storage.clone(), len(step.qkv)
    k_cache, v_cache = storage[:, :rows, ..., : step.head_dim]
    kv_heads = k_cache.shape[1]
    projected = step.qkv.unflatten(-1, (-1, step.head_dim))[:, None]
    turned = projected[:, :, : step.n_head + kv_heads].float()
    rotated = _cast(apply_rotary_emb(turned, step.rope_table[position : position + 1]), step.qkv.dtype)
    k_cache[:, :, position] = rotated[:, 0, step.n_head :]
    v_cache[:, :, position] = projected[:, 0, step.n_head + kv_heads :]
    keys = torch.arange(_POSITIONS, device=storage.device)
    first = torch.tensor(first_key, device=storage.device)[:, None]
    mask = ((keys <= position) & (keys >= first)) | (keys == position)
    q = rotated[:, :, : step.n_head].transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q.double(), k_cache.double(), v_cache.double(), attn_mask=mask[:, None, None], enable_gqa=True
    )
    return out.flatten(1), storage


def _check(step: Step, position: int, first_key: Tensor | None = None) -> None:
    """The step's output, and its caches afterwards, where every key that must not be seen is NaN."""
    first = [0] * len(step.qkv) if first_key is None else first_key.tolist()
    expected, storage = _expected(step, position, first)
    poisoned = Step(step.qkv, step.rope_table, step.storage.clone(), step.n_head, step.head_dim)
    for row, start in enumerate(first):
        for cache in (storage, poisoned.storage):
            hidden = cache[:, row, ..., : step.head_dim]
            hidden[:, :, position + 1 :] = float("nan")
            hidden[:, :, : min(start, position)] = float("nan")
        poisoned.storage[:, row, :, position, : step.head_dim] = float("nan")
    out = poisoned.run(position, first_key)
    tolerance = _RELATIVE[out.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance / 4)
    torch.testing.assert_close(poisoned.storage, storage, rtol=0, atol=0, equal_nan=True)


def check_head_widths(device: str = "cpu") -> None:
    """Every width of the models and two of the small ones, padded or not, in every format."""
    for dtype, head_dim, stride in (
        (torch.float32, 32, 32), (torch.float32, 100, 104), (torch.bfloat16, 48, 48), (torch.bfloat16, 64, 64),
        (torch.bfloat16, 100, 104), (torch.bfloat16, 100, 100), (torch.float16, 128, 128),
    ):  # fmt: skip
        step = _step(device, dtype, head_dim, stride)
        for position in (64, 200):
            _check(step, position)


def check_positions(device: str = "cpu") -> None:
    """The first position, those of the condition, both sides of a tile, the last."""
    for dtype in (torch.float32, torch.bfloat16):
        step = _step(device, dtype, 64)
        for position in (0, 1, 2, _CONDITION, 63, 65, 200, _POSITIONS - 1):
            _check(step, position)


def check_grouped_heads(device: str = "cpu") -> None:
    """Two and four query heads on each key head."""
    for heads, kv_heads in ((4, 2), (4, 1)):
        step = _step(device, torch.float32, 32, heads=heads, kv_heads=kv_heads)
        for position in (1, 130):
            _check(step, position)


def check_first_keys(device: str = "cpu") -> None:
    """Rows that begin at different keys; where that is at or beyond the position, only the new key is seen."""
    step = _step(device, torch.bfloat16, 64, rows=5)
    for position in (63, 200):
        for dtype in (torch.int64, torch.int32):
            _check(step, position, torch.tensor([0, 5, position - 1, position, position + 1], dtype=dtype).to(device))
    alone = step.run(200, torch.tensor([200, 201, 0, 200, 209], device=device))
    new_values = step.qkv[:, -2 * 64 :]
    assert torch.equal(alone[[0, 1, 3, 4]], new_values[[0, 1, 3, 4]])


def check_condition(device: str = "cpu") -> None:
    """Queries vanish in the condition, so that its tokens average the values."""
    step = _step(device, torch.float32, 64)
    values = step.caches[1][:2, :, :2].clone()
    new_values = step.qkv[:, -2 * 64 :].unflatten(1, (2, 64))
    mean = (values.sum(2) + new_values) / 3
    torch.testing.assert_close(step.run(2).unflatten(1, (2, 64)), mean, rtol=1e-5, atol=1e-6)
    assert step.caches[0][:2, :, 2].eq(0).all()


def check_rows(device: str = "cpu") -> None:
    """A row has the same bits whatever the number of rows, and whatever the others contain."""
    first = torch.tensor([0, 7, 30, 2, 0], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        step = _step(device, dtype, 64, rows=5)
        whole = step.run(150, first)
        for rows in (1, 2, 4):
            assert torch.equal(step.run(150, first[:rows].contiguous(), rows), whole[:rows])
        step.qkv[0], step.storage[:, 0] = 3.0, -1.0
        assert torch.equal(step.run(150, first)[1:], whole[1:])


def check_wide_rows(device: str = "cpu") -> None:
    """qkv may be a view of wider rows, and the result is allocated where `out` is left out."""
    step = _step(device, torch.float32, 64)
    packed = step.run(70)
    wide = torch.full((2, step.qkv.shape[1] + 5), float("nan"), device=device)
    wide[:, :-5] = step.qkv
    position = torch.tensor([70], device=device)
    allocated = decode_attention(wide[:, :-5], step.rope_table, position, *step.caches, n_head=2)
    assert torch.equal(allocated, packed)


def check_replay(device: str = "cpu") -> None:
    """One launch serves every position: replayed as a CUDA graph on a GPU, repeated on the CPU."""
    step = _step(device, torch.bfloat16, 64)
    fresh = Step(step.qkv, step.rope_table, step.storage.clone(), step.n_head, step.head_dim)
    position, out = torch.tensor([62], device=device), torch.empty(2, 128, dtype=torch.bfloat16, device=device)

    def replay() -> None:
        decode_attention(step.qkv, step.rope_table, position, *step.caches, n_head=2, out=out)

    if device == "cuda":
        replay()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replay()
        replay = graph.replay
    for at in (62, 63, 64, 150):
        position.fill_(at)
        replay()
        assert torch.equal(out, fresh.run(at))
    assert torch.equal(step.storage, fresh.storage)


def check_model(device: str = "cpu") -> None:
    """Step after step, the attention layer of the model; both caches hold the same in the end."""
    torch.manual_seed(3)
    layer = Attention(ModelArgs(dim=64, n_head=4, n_kv_head=2)).to(device).eval()
    table = precompute_freqs_cis_2d(2, 16, cls_token_num=_CONDITION, device=device)
    plain, fused = (KVCache(2, 7, 2, 16, torch.float32, device) for _ in range(2))
    with torch.inference_mode():
        for step in range(7):
            x, position = torch.randn(2, 1, 64, device=device), torch.tensor([step], device=device)
            plain.length = step + 1
            expected = layer(x, table[position], position, cache=plain)
            mixed = decode_attention(layer.wqkv(x)[:, 0], table, position, fused.k_cache, fused.v_cache, n_head=4)
            torch.testing.assert_close(layer.wo(mixed)[:, None], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused.k_cache, plain.k_cache)
    assert torch.equal(fused.v_cache, plain.v_cache)


def _quantized(step: Step, dtype: torch.dtype) -> QuantizedKVCache:
    """The keys and values of the step's storage in a cache in 8 bits."""
    keys, values = step.caches
    cache = QuantizedKVCache(len(keys), _POSITIONS, keys.shape[1], step.head_dim, dtype, keys.device)
    cache.update(torch.arange(_POSITIONS, device=keys.device), keys, values)
    return cache


def _run_quantized(
    step: Step, cache: QuantizedKVCache, position: int, first_key: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """What the kernel returns for the first `rows` rows (None: all); the cache changes."""
    qkv = step.qkv[:rows]
    return decode_attention(
        qkv, step.rope_table, torch.tensor([position], device=qkv.device), cache.k_cache, cache.v_cache,
        n_head=step.n_head, first_key=first_key, **cache.scales,
    )  # fmt: skip


def _check_quantized(step: Step, dtype: torch.dtype, position: int, first_key: Tensor | None = None) -> None:
    """Output and cache against `QuantizedKVCache` of PyTorch, where what must not be seen has scales that are NaN."""
    rows, cache = len(step.qkv), _quantized(step, dtype)
    first = torch.zeros(rows, dtype=torch.int64) if first_key is None else first_key.cpu().clamp(max=position)
    keys = torch.arange(_POSITIONS)
    hidden = ((keys > position) | (keys < first[:, None]))[:, None].to(step.qkv.device)
    for scale in cache.scales.values():
        scale[:rows].masked_fill_(hidden, float("nan"))
    expected = copy.deepcopy(cache)
    for scale in cache.scales.values():
        scale[:rows, :, position] = float("nan")
    out = _run_quantized(step, cache, position, first_key)

    projected = step.qkv.unflatten(-1, (-1, step.head_dim))[:, None]
    turned = projected[:, :, : step.n_head + cache.k_cache.shape[1]].float()
    rotated = _cast(apply_rotary_emb(turned, step.rope_table[position : position + 1]), step.qkv.dtype)
    q, k = rotated[:, :, : step.n_head].transpose(1, 2), rotated[:, :, step.n_head :].transpose(1, 2)
    v = projected[:, :, step.n_head + k.shape[1] :].transpose(1, 2)
    at = torch.tensor([position], device=q.device)
    keys, values = (stored.double().nan_to_num() for stored in expected.update(at, k.float(), v.float()))
    mixed = F.scaled_dot_product_attention(q.double(), keys, values, attn_mask=~hidden[:, :, None], enable_gqa=True)
    tolerance = _RELATIVE[out.dtype]
    torch.testing.assert_close(out.double(), mixed.flatten(1), rtol=tolerance, atol=tolerance / 4)
    for buffer, wanted in zip(cache.buffers(), expected.buffers()):
        torch.testing.assert_close(buffer.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)


def check_eight_bits(device: str = "cpu") -> None:
    """Keys and values with scales, padded or not, grouped heads, first keys, the first positions and the last."""
    for dtype in EIGHT_BITS.values():
        for model_format, head_dim, heads in (
            (torch.float32, 32, 4), (torch.bfloat16, 64, 2), (torch.bfloat16, 100, 2), (torch.float16, 48, 2),
        ):  # fmt: skip
            step = _step(device, model_format, head_dim, heads=heads)
            for position in (0, 1, _CONDITION, 130, _POSITIONS - 1):
                _check_quantized(step, dtype, position)
        step = _step(device, torch.float32, 64, rows=4)
        _check_quantized(step, dtype, 150, torch.tensor([0, 5, 149, 151], device=device))


def check_eight_bit_rounding(device: str = "cpu") -> None:
    """To the nearest number of the format, ties to the even one; a vector of zeros stays one."""
    values = {
        torch.int8: ([127, 0.5, 1.5, -2.5, 3.49, -126.5], [127, 0, 2, -2, 3, -126]),
        # steps are 2 from 16 on, 1/8 from 1 on, and 2^-9 below 2^-6
        torch.float8_e4m3fn: ([448, 17, 19, -1.97, 2**-10, 3 * 2**-10], [448, 16, 20, -2, 0, 2**-8]),
    }
    for dtype, (given, wanted) in values.items():
        step = _step(device, torch.float32, 32)
        step.qkv[0, -32:] = F.pad(torch.tensor(given, device=device), (0, 26))
        step.qkv[1, -32:] = 0
        cache = _quantized(step, dtype)
        _run_quantized(step, cache, 9)
        assert cache.v_cache[0, 1, 9, :6].tolist() == wanted and not cache.v_cache[0, 1, 9, 6:].float().any()
        assert cache.v_scale[0, 1, 9] == 1
        assert not cache.v_cache[1, 1, 9].float().any() and 0 < cache.v_scale[1, 1, 9] < 1e-12


def check_eight_bit_rows(device: str = "cpu") -> None:
    """A row has the same bits whatever the number of rows, and whatever the others contain."""
    for dtype in EIGHT_BITS.values():
        step = _step(device, torch.bfloat16, 64, rows=5)
        whole = _run_quantized(step, _quantized(step, dtype), 150)
        for rows in (1, 2, 4):
            assert torch.equal(_run_quantized(step, _quantized(step, dtype), 150, rows=rows), whole[:rows])
        step.qkv[0], step.storage[:, 0] = 3.0, -1.0
        assert torch.equal(_run_quantized(step, _quantized(step, dtype), 150)[1:], whole[1:])


@pytest.mark.parametrize("check", [
    "check_head_widths", "check_positions", "check_grouped_heads", "check_first_keys", "check_condition", "check_rows",
    "check_wide_rows", "check_replay", "check_model", "check_eight_bits", "check_eight_bit_rounding",
    "check_eight_bit_rows",
])  # fmt: skip
def test_interpreted(check: str) -> None:
    run_interpreted(__name__, check)


def test_wrong_arguments() -> None:
    step = _step("cpu", torch.float32, 32)
    keys, values = step.caches
    arguments = {
        "qkv": step.qkv, "rope_table": step.rope_table, "position": torch.tensor([1]), "k_cache": keys,
        "v_cache": values, "n_head": 2,
    }  # fmt: skip
    strided = torch.zeros(4, dtype=torch.int64)[::2]
    for name, wrong, message in (
        ("qkv", step.qkv.bfloat16(), "must be torch.bfloat16"),
        ("qkv", step.qkv.double(), "float32, bfloat16 or float16"),
        ("qkv", step.qkv[:, 1:], r"\(rows, 192\)"),
        ("qkv", step.qkv.repeat(2, 1), "3 rows, too few for 4"),
        ("v_cache", values[:, :, 1:], "equal shapes"),
        ("v_cache", values.clone().transpose(2, 3).contiguous().transpose(2, 3), "strides"),
        ("n_head", 3, "cannot serve 3"),
        ("rope_table", step.rope_table[:, 1:], "rope table"),
        ("rope_table", step.rope_table.double(), "rope table"),
        ("position", torch.tensor(1), "position"),
        ("position", torch.tensor([1], dtype=torch.int32), "position"),
        ("first_key", torch.zeros(3, dtype=torch.int64), "first_key"),
        ("first_key", strided, "first_key"),
        ("out", torch.zeros(2, 32), "out"),
        ("out", torch.zeros(2, 64, dtype=torch.bfloat16), "out"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(**{**arguments, name: wrong})


def test_wrong_caches_in_eight_bits() -> None:
    step = _step("cpu", torch.float32, 32)
    cache = _quantized(step, torch.int8)
    keys, values, scales = cache.k_cache, cache.v_cache, cache.scales
    arguments = {
        "qkv": step.qkv, "rope_table": step.rope_table, "position": torch.tensor([1]), "n_head": 2,
        "k_cache": keys, "v_cache": values, **scales,
    }  # fmt: skip
    short, turned = scales["k_scale"][:, :, 1:], scales["k_scale"].mT.contiguous().mT
    for changed, message in (
        ({"k_scale": None, "v_scale": None}, "must be torch.float32 as qkv is, not torch.int8"),
        ({"k_cache": step.caches[0], "v_cache": step.caches[1]}, "int8 or float8_e4m3fn, not torch.float32"),
        ({"k_cache": keys.view(torch.float8_e4m3fn)}, "not torch.float8_e4m3fn and torch.int8"),
        ({"v_scale": None}, r"float32 \(3, 2, 210\)"),
        ({"k_scale": short}, r"float32 \(3, 2, 210\)"),
        ({"k_scale": scales["k_scale"].half()}, "float32"),
        ({"k_scale": turned}, r"strides \(420, 210, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(**{**arguments, **changed})
