"""Decoding with fixed shapes: the same tokens as the plain engine, whatever is left to tensors; graphs need a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from autoregressive.engine import static
from autoregressive.engine.static import StaticEngine, padded_batch
from autoregressive.engine.weight_only import Int8Linear, int8_copy
from autoregressive.models.generate import generate
from autoregressive.models.noise import ImageNoise
from tests.autoregressive.models.test_generate import PUBLISHED_C2I
from tests.autoregressive.models.tiny import captions, formula_model, random_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    kv_heads=st.sampled_from([4, 2, 1]),
    grid=st.integers(1, 4),
    prefix=st.integers(0, 5),
    options=st.fixed_dictionaries(
        {
            "cfg_scale": st.sampled_from([1.0, 1.5, 4.0]),
            "cfg_interval": st.sampled_from([-1, 0, 2]),
            "cfg_start": st.sampled_from([0, 2]),
            "cfg_schedule": st.sampled_from(["constant", "linear"]),
            "temperature_end": st.sampled_from([None, 0.5]),
            "top_k": st.sampled_from([0, 10]),
            "top_p": st.sampled_from([1.0, 0.8]),
            "min_p": st.sampled_from([0.0, 0.02]),
        }
    ),
    data=st.data(),
)
def test_every_option_gives_the_tokens_of_the_plain_engine(seed, batch, kv_heads, grid, prefix, options, data):
    shape, masks = {"n_kv_head": kv_heads, "block_size": grid**2}, None
    if prefix:
        model = random_model(seed, model_type="t2i", cls_token_num=prefix, **shape)
        lengths = data.draw(st.lists(st.integers(1, prefix), min_size=batch, max_size=batch))
        cond, masks = captions(batch, lengths, prefix)
    else:
        model, cond = random_model(seed, **shape), torch.randint(5, (batch,))
    given_tokens = torch.randint(-1, 50, (batch, grid**2)) if data.draw(st.booleans()) else None
    count = data.draw(st.integers(1, grid**2))
    engine = StaticEngine(model, compile_blocks=False)
    plain, static = (
        generate(
            m, cond, count, masks, generators=ImageNoise(range(batch)), **options,
            given=None if given_tokens is None else given_tokens[:, :count],
        )
        for m in (model, engine)
    )  # fmt: skip
    assert torch.equal(plain, static)


def test_batches_of_different_sizes_follow_each_other():
    model = random_model()
    engine = StaticEngine(model, compile_blocks=False)
    for labels in ([1, 2, 3], [4], [0, 1], [3, 2, 1, 0]):
        options = {"cfg_scale": 2.0, "cfg_interval": 3}
        tokens, expected = (
            generate(m, torch.tensor(labels), 9, generators=ImageNoise(labels), **options) for m in (engine, model)
        )
        assert torch.equal(tokens, expected)


class FakeGraphs:
    """Stands where `CudaGraphs` does: runs every step that is "replayed", and notes what is recorded and dropped."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.dropped = 0

    def record(self, step, rewind):
        """Three warm-ups as on a GPU, each undone."""
        self.recorded += 1
        for _ in range(3):
            step(), rewind()

        def replay() -> None:
            self.replayed += 1
            step()

        return replay

    def forget(self) -> None:
        """The graphs are gone."""
        self.dropped += 1


def test_graphs_outlive_a_change_of_the_batch():
    model = random_model()
    engine = StaticEngine(model, compile_blocks=False)
    engine._graphs = graphs = FakeGraphs()
    recorded, options = [], {"cfg_scale": 2.0, "cfg_interval": 3, "top_k": 20}
    for images in (8, 3, 8, 4, 3, 8):  # 3 and 4 are one padded size
        labels = torch.arange(images) % 5
        tokens, expected = (
            generate(m, labels, 9, generators=ImageNoise(range(images)), **options) for m in (engine, model)
        )
        assert torch.equal(tokens, expected)
        recorded.append(graphs.recorded)
    assert recorded == [2, 4, 4, 4, 4, 4] and graphs.replayed == 6 * 8  # guided and unguided, two sizes
    assert graphs.dropped == 1  # by the first caches
    generate(engine, torch.arange(9) % 5, 9, generators=ImageNoise(range(9)), **options)
    assert (graphs.dropped, graphs.recorded) == (2, 6)  # larger caches are at other addresses


def test_graphs_of_many_settings_are_dropped_in_time(monkeypatch):
    monkeypatch.setattr(static, "_MOST_GRAPHS", 3)
    model = random_model()
    engine = StaticEngine(model, compile_blocks=False)
    engine._graphs = graphs = FakeGraphs()
    for top_k in range(1, 9):
        tokens, expected = (
            generate(m, torch.tensor([1]), 9, generators=ImageNoise([3]), top_k=top_k) for m in (engine, model)
        )
        assert torch.equal(tokens, expected) and len(engine._steps) <= 3
    assert graphs.recorded == 8 and graphs.dropped == 1 + 2


def test_warming_up_records_what_the_first_generation_needs():
    engine = StaticEngine(random_model(model_type="t2i", cls_token_num=4), compile_blocks=False)
    engine._graphs = graphs = FakeGraphs()
    options = {"cfg_scale": 3.0, "top_k": 10}
    engine.warm_up(3, **options)
    before = graphs.recorded
    features, mask = captions(3, [4, 2, 1], 4)
    generate(engine, features, 9, mask, generators=ImageNoise([1, 2, 3]), **options)
    assert graphs.recorded == before == 1


def test_batches_are_filled_up_to_few_sizes():
    assert [padded_batch(n) for n in (1, 2, 3, 5, 33, 64, 65, 128, 129)] == [1, 2, 4, 8, 64, 64, 128, 128, 192]


@pytest.mark.slow  # torch.compile
def test_compiled_blocks_write_the_cache_in_place():
    engine = StaticEngine(random_model(dim=64, block_size=16), compile_blocks=False)
    cache = engine.new_cache(8, 17, torch.float32, torch.device("cpu"), None).fixed(4, 17).layers[0]
    block, x = engine.model.layers[0], torch.randn(4, 1, 64)
    position, mask = torch.tensor([5]), torch.ones(1, 1, 1, 17, dtype=torch.bool)
    table = engine.model.freqs_cis[position]
    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(block), x, table, position, mask, cache)
    assert cache.k_cache[:, :, 5].abs().min() > 0 and cache.k_cache[:, :, 6:].abs().max() == 0
    allocated = [line for line in code[0].splitlines() if "= empty_strided_cpu((" in line]
    assert allocated and not [line for line in allocated if "(4, 4, 17, 16)" in line]  # no copy of the cache


def test_other_generators_are_drawn_from_as_ever():
    model = random_model()
    engine, labels = StaticEngine(model, compile_blocks=False), torch.tensor([1, 2])
    tokens = []
    for m in (engine, model):
        torch.manual_seed(1)
        tokens.append(generate(m, labels, 9, cfg_scale=2.0, cfg_interval=3, top_k=20))
    assert torch.equal(*tokens)
    calls = []
    generate(engine, labels, 9, generators=ImageNoise([1, 2]), on_token=calls.append)
    assert calls == list(range(9))


def test_int8_copies_share_what_they_do_not_replace_and_stay_close():
    model = random_model(dim=64, initializer_range=0.1)
    own = int8_copy(model)
    assert own.tok_embeddings.weight is model.tok_embeddings.weight
    assert isinstance(own.layers[0].attention.wqkv, Int8Linear) and isinstance(own.output, Int8Linear)
    assert isinstance(model.output, torch.nn.Linear)
    idx, label = torch.randint(50, (2, 8)), torch.tensor([1, 2])
    with torch.no_grad():
        exact, rounded = (m(idx, label, torch.arange(9))[0] for m in (model, own))
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.02
    engine = StaticEngine(model, "int8", compile_blocks=False)
    assert generate(engine, label, 9, sample_logits=False).shape == (2, 9)


@pytest.mark.slow  # torch.compile
def test_compiled_blocks_give_the_published_tokens():
    model = formula_model()
    engine = StaticEngine(model)
    expected = [row[:5] for row in PUBLISHED_C2I[1.0, -1]]
    assert generate(engine, torch.tensor([1, 9]), 5, sample_logits=False).tolist() == expected
    assert model.layers[0]._compiled_call_impl is None


@needs_gpu
@pytest.mark.parametrize("compile_blocks", [False, True])
def test_graphs_give_the_tokens_of_the_plain_engine(compile_blocks):
    model = random_model(block_size=36).cuda()
    engine = StaticEngine(model, compile_blocks=compile_blocks)
    labels = torch.tensor([1, 2, 3], device="cuda")
    options = {"cfg_scale": 2.0, "cfg_interval": 20, "top_k": 20}
    for _ in range(2):
        tokens, expected = (
            generate(m, labels, 36, generators=ImageNoise([5, 6, 7], "cuda"), **options) for m in (engine, model)
        )
        assert torch.equal(tokens, expected)
