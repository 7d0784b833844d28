"""The C++ step: goldens, the eager engine, images independent of batch and threads, int8 within its error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.engine.native import NativeCache, NativeEngine, unsupported
from autoregressive.engine.packing import quantize_rows
from autoregressive.models.cache import DecodeCache, KVCache
from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from autoregressive.models.noise import ImageNoise
from tests import golden
from tests.autoregressive.engine.test_published import needs_compiler
from tests.autoregressive.models.tiny import captions, from_golden, random_model

pytestmark = needs_compiler
each_format = pytest.mark.parametrize(
    "quantize, kv_cache_dtype", [("none", "auto"), ("int8", "auto"), ("none", "int8"), ("int8", "int8")]
)


@golden.cases("gpt.generate")
def test_greedy_generation_matches_the_golden(case):
    model, params = from_golden(case), case.params
    if params["sampling"].get("sample_logits", True):
        pytest.skip("drawn from torch's global generator: the same code as in the eager engine")
    options = {name: params[name] for name in ("cfg_scale", "cfg_interval") if name in params}
    masks = case.tensors.get("emb_masks")
    cond, count = case.tensors["cond"], params["max_new_tokens"]
    tokens = generate(NativeEngine(model), cond, count, masks, **options, **params["sampling"])
    assert torch.equal(tokens, generate(model, cond, count, masks, **options, **params["sampling"]))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (6, 3)]),
    head_dim=st.sampled_from([4, 8, 20, 36]),
    grid=st.integers(1, 5),
    prefix=st.integers(0, 5),
    scale=st.sampled_from([1.0, 1.5, 4.0]),
    interval=st.sampled_from([-1, 0, 2]),
    threads=st.integers(1, 3),
    data=st.data(),
)
@torch.no_grad()
def test_float32_equals_the_eager_engine(seed, batch, heads, head_dim, grid, prefix, scale, interval, threads, data):
    n_head, n_kv_head = heads
    shape = {"dim": head_dim * n_head, "n_head": n_head, "n_kv_head": n_kv_head, "block_size": grid**2}
    cond, masks = torch.randint(5, (batch,)), None
    if prefix:
        model = random_model(seed, model_type="t2i", cls_token_num=prefix, **shape)
        lengths = data.draw(st.lists(st.integers(1, prefix), min_size=batch, max_size=batch))
        cond, masks = captions(batch, lengths, prefix)
    else:
        model = random_model(seed, **shape)
    options = {"cfg_scale": scale, "cfg_interval": interval, "top_k": data.draw(st.sampled_from([0, 3, 40, 90]))}
    drawn = data.draw(st.booleans())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        tokens = [
            generate(m, cond, grid**2, masks, sample_logits=drawn, generators=ImageNoise(range(batch)), **options)
            for m in (model, NativeEngine(model))
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*tokens)


def fed_logits(engine, cond, tokens, cache) -> torch.Tensor:
    """Logits (rows, n, V) after the condition and after each of `tokens` (rows, n - 1)."""
    prefix, count = engine.cls_token_num, tokens.shape[1]
    position = torch.arange(prefix + count)
    parts = [engine(None, cond, position[:prefix], cache=cache, last_only=True)[0]]
    parts += [engine(tokens[:, i, None], None, position[prefix + i, None], cache=cache)[0] for i in range(count)]
    return torch.cat(parts, dim=1)


def step_logits(engine, labels, tokens) -> torch.Tensor:
    """`fed_logits` after a class, in the engine's own caches."""
    dtype = engine.tok_embeddings.weight.dtype
    cache = engine.new_cache(len(labels), tokens.shape[1] + 1, dtype, torch.device("cpu"), None)
    return fed_logits(engine, labels, tokens, cache)


def wide_model(**fields):
    """A model of a more usual shape: heads of 64, 300 codes, 36 positions."""
    shape = {"dim": 128, "n_head": 2, "vocab_size": 300, "block_size": 36, "initializer_range": 0.06}
    return random_model(3, **{**shape, **fields})


@torch.no_grad()
def test_logits_of_all_formats():
    labels, tokens = torch.arange(5), torch.randint(300, (5, 35))
    model = wide_model()
    exact = step_logits(Engine(model), labels, tokens)
    torch.testing.assert_close(step_logits(NativeEngine(model), labels, tokens), exact, atol=2e-4, rtol=1e-4)
    size = exact.std()
    int8 = (step_logits(NativeEngine(model, "int8"), labels, tokens) - exact).square().mean().sqrt()
    assert 0 < int8 < 0.05 * size
    half = wide_model().bfloat16()
    error = lambda engine: (step_logits(engine, labels, tokens) - exact).square().mean().sqrt()  # noqa: E731
    assert error(NativeEngine(half)) < 1.2 * error(Engine(half))  # as close to float32 as PyTorch's bfloat16
    assert error(NativeEngine(half, "int8")) < 0.06 * size
    assert 0 < error(NativeEngine(model, kv_cache_dtype="int8")) < 0.02 * size
    assert error(NativeEngine(half, kv_cache_dtype="int8")) < 0.03 * size


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_is_bit_equal_in_any_company_and_with_any_threads(dtype, quantize, kv_cache_dtype):
    engine = NativeEngine(wide_model().to(dtype), quantize, kv_cache_dtype=kv_cache_dtype)
    labels, tokens = torch.arange(19) % 5, torch.randint(300, (19, 20))
    together = step_logits(engine, labels, tokens)
    for rows in ([0], [18, 3], list(range(5, 16))):
        assert torch.equal(step_logits(engine, labels[rows], tokens[rows]), together[rows])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(step_logits(engine, labels, tokens), together)
    finally:
        torch.set_num_threads(before)


@each_format
def test_bfloat16_images_do_not_depend_on_batch_or_order(quantize, kv_cache_dtype):
    engine = NativeEngine(wide_model().bfloat16(), quantize, kv_cache_dtype=kv_cache_dtype)
    labels = torch.tensor([0, 1, 1, 4, 2])
    options = {"cfg_scale": 2.0, "cfg_interval": 20, "top_k": 200}
    batch = generate(engine, labels, 36, generators=ImageNoise(range(5)), **options)
    for rows in ([2], [4, 0, 1]):
        some = generate(engine, labels[rows], 36, generators=ImageNoise(rows), **options)
        assert torch.equal(some, batch[rows])


def stored(cache: NativeCache, dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (layers, rows, kv_heads, positions, head_dim) as a cache holds them, without scales."""
    keys, values = (packed[..., None].view(dtype) for packed in (cache.keys, cache.values))
    keys = keys.transpose(-3, -2).flatten(-2).flatten(-3, -2)  # (.., P / 16, words, 16, per): 16 before words
    values = values.movedim(-1, -3).flatten(-2).flatten(-3, -2)  # (.., P / per, blocks, 16, per): per before blocks
    return keys, values[..., :head_dim]


@pytest.mark.parametrize("fields", [{}, {"dim": 80, "n_head": 4, "n_kv_head": 2}])
@torch.no_grad()
def test_the_step_rounds_keys_and_values_to_int8_by_the_rule(fields):
    model, labels, tokens = wide_model(**fields), torch.arange(5), torch.randint(300, (5, 35))
    full, rounded = (NativeEngine(model, kv_cache_dtype=dtype) for dtype in ("auto", "int8"))
    for engine in (full, rounded):
        step_logits(engine, labels, tokens)
    exact = stored(full._native_cache, torch.float32, model.config.head_dim)
    cache = rounded._native_cache
    scales = (cache.key_scale, cache.value_scale)
    for x, held, scale in zip(exact, stored(cache, torch.int8, model.config.head_dim), scales):
        expected, expected_scale = quantize_rows(x[0, :, :, :36])  # the first layer's do not depend on any attention
        assert torch.equal(held[0, :, :, :36], expected) and torch.equal(scale[0, :, :, :36], expected_scale)
        assert (expected[:, :, 1:].abs().amax(-1) == 127).all()  # the class's key is rotated to zero


class RoundedCache(KVCache):
    """Its keys and values become those of an int8 cache, which must be the nearest, when a single token is computed."""

    def __init__(self, *held: tuple[torch.Tensor, torch.Tensor]) -> None:
        rows, heads, positions, head_dim = held[0][0].shape
        super().__init__(rows, positions, heads, head_dim, torch.float32)
        self.held = held  # keys, then values, with their scales

    def update(self, input_pos, k_val, v_val):
        views = super().update(input_pos, k_val, v_val)
        if len(input_pos) == 1:  # a condition attends to itself before it is rounded
            for exact, (ints, scale) in zip(views, self.held):
                scale = scale[:, :, : exact.shape[2], None]
                torch.testing.assert_close(scale * 127, exact.abs().amax(-1, keepdim=True), rtol=1e-4, atol=1e-9)
                nearest = ints[:, :, : exact.shape[2]] * scale
                assert ((nearest - exact).abs() <= scale * 0.505).all()
                exact.copy_(nearest)
        return views


@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("fields", [{}, {"dim": 80, "n_head": 4, "n_kv_head": 2}])
@torch.no_grad()
def test_an_int8_cache_gives_the_logits_of_attention_over_rounded_keys_and_values(fields, prefix):
    rows, count, mask = 4, 80, None  # more than four blocks of positions, which are read together
    fields = {"block_size": 81, **fields}
    if prefix:
        model = wide_model(model_type="t2i", cls_token_num=prefix, **fields)
        cond, masks = captions(rows, [1, 3, 6, 4], prefix)
        mask = torch.cat([masks.bool(), torch.ones(rows, count, dtype=torch.bool)], dim=1)
    else:
        model, cond = wide_model(**fields), torch.arange(rows)
    engine, tokens = NativeEngine(model, kv_cache_dtype="int8"), torch.randint(300, (rows, count))
    cache = engine.new_cache(rows, model.cls_token_num + count, torch.float32, torch.device("cpu"), mask)
    found = fed_logits(engine, cond, tokens, cache)
    keys, values = stored(cache, torch.int8, model.config.head_dim)
    held = zip(zip(keys, cache.key_scale), zip(values, cache.value_scale))
    reference = DecodeCache([RoundedCache(*layer) for layer in held], mask)
    torch.testing.assert_close(found, fed_logits(model, cond, tokens, reference), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_int8_cache_takes_a_quarter_and_what_stood_in_it_does_not_matter():
    labels, tokens = torch.arange(3), torch.randint(300, (3, 35))
    for dtype, times in ((torch.float32, 4), (torch.bfloat16, 2)):
        full, engine = (NativeEngine(wide_model().to(dtype), kv_cache_dtype=kv) for kv in ("auto", "int8"))
        expected = step_logits(engine, labels, tokens)
        wide, cache = (e.new_cache(3, 36, dtype, torch.device("cpu"), None) for e in (full, engine))
        assert wide.key_scale is None and wide.value_scale is None
        assert cache.keys.nbytes == cache.values.nbytes == 2 * 3 * 2 * 48 * 64  # layers, rows, heads, positions ...
        assert wide.keys.nbytes == wide.values.nbytes == times * cache.keys.nbytes
        assert cache.key_scale.nbytes == cache.value_scale.nbytes == cache.keys.nbytes // 64 * 4
        for held in (cache.keys, cache.values):
            held.fill_(0x7F7F7F7F)
        for scale in (cache.key_scale, cache.value_scale):
            scale.fill_(torch.nan)
        assert torch.equal(step_logits(engine, labels, tokens), expected)


@torch.no_grad()
def test_keys_and_values_of_zeros_stay_zero():
    model, labels, tokens = wide_model(), torch.arange(2), torch.randint(300, (2, 9))
    for layer in model.layers:
        layer.attention.wqkv.weight.zero_()
    rounded, full = (step_logits(NativeEngine(model, kv_cache_dtype=kv), labels, tokens) for kv in ("int8", "auto"))
    assert torch.equal(rounded, full) and full.isfinite().all()


AVX2 = ("-mavx2", "-mfma", "-mno-avx512f")


@pytest.mark.slow  # compiles the step once more
@torch.no_grad()
@each_format
def test_without_avx512_the_same_numbers_come_out(quantize, kv_cache_dtype):
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("not an x86 processor with AVX2")
    labels, tokens = torch.arange(3), torch.randint(300, (3, 20))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        model = wide_model().to(dtype)
        plain = NativeEngine(model, quantize, machine=AVX2, kv_cache_dtype=kv_cache_dtype)
        assert not plain._library.instruction_sets() & 7
        expected = step_logits(NativeEngine(model, quantize, kv_cache_dtype=kv_cache_dtype), labels, tokens)
        error = (step_logits(plain, labels, tokens) - expected).abs().max()
        assert error < tolerance * expected.abs().max()


def test_changed_weights_are_packed_anew():
    model = random_model()
    engine, label = NativeEngine(model), torch.tensor([2])
    before = generate(engine, label, 9, sample_logits=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    after = generate(engine, label, 9, sample_logits=False)
    assert torch.equal(after, generate(model, label, 9, sample_logits=False)) and not torch.equal(before, after)


def test_the_draw_follows_the_filtered_probabilities():
    engine = NativeEngine(random_model())
    logits = torch.tensor([2.0, 0.0, 1.0, 1.0, -3.0])[None, None].expand(20_000, 1, 5)
    for top_k in (0, 2, 3):
        tokens, _ = engine.sample(logits, temperature=0.8, top_k=top_k, generators=ImageNoise(range(20_000)))
        kept = logits[0, 0] / 0.8
        if top_k:
            kept = kept.masked_fill(kept < kept.topk(top_k).values[-1], -torch.inf)  # the tie at the second place stays
        share = torch.bincount(tokens.flatten(), minlength=5) / len(tokens)
        torch.testing.assert_close(share, kept.softmax(-1), atol=0.012, rtol=0)
        assert (share[kept.isinf()] == 0).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.integers(1, 700), top_k=st.integers(0, 800), coarse=st.booleans())
def test_the_draw_is_the_eager_draw(seed, vocab, top_k, coarse):
    logits = torch.randn(4, 1, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    logits = logits.round() if coarse else logits  # many ties at the k-th place
    model, options = random_model(), {"temperature": 0.9, "top_k": top_k}
    native, eager = (
        engine.sample(logits, generators=ImageNoise(range(seed, seed + 4)), **options)[0]
        for engine in (NativeEngine(model), Engine(model))
    )
    assert torch.equal(native, eager)


def test_what_it_cannot_do_is_refused_or_left_to_pytorch():
    model = random_model()
    assert unsupported(model) is None
    assert "float16" in unsupported(random_model().half())
    assert "meta" in unsupported(random_model().to("meta"))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        NativeEngine(random_model().half())
    for unknown in ("fp8", "bf16", "none"):
        with pytest.raises(ValueError, match=f"auto or int8, not '{unknown}'"):
            NativeEngine(model, kv_cache_dtype=unknown)
    with pytest.raises(ValueError, match="one generator per image"):
        generate(NativeEngine(model), torch.tensor([1, 2]), 3, generators=ImageNoise([1]))
    options = {"top_p": 0.8, "min_p": 0.01, "cfg_scale": 2.0, "temperature_end": 0.5}
    native, eager = (
        generate(m, torch.tensor([1, 2]), 9, generators=ImageNoise([1, 2]), **options)
        for m in (NativeEngine(model), model)
    )
    assert torch.equal(native, eager)
    torch.manual_seed(3)
    legacy = generate(model, torch.tensor([1, 2]), 9, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(generate(NativeEngine(model), torch.tensor([1, 2]), 9, top_k=20), legacy)
