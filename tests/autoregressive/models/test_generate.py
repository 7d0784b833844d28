"""Generation against the goldens, the cache against the full forward, a batch against its singles."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoregressive.models import generate as generate_module
from autoregressive.models.cache import DecodeCache
from autoregressive.models.generate import (
    decode_attention_backends,
    decode_n_tokens,
    decode_one_token,
    generate,
    prefill,
)
from autoregressive.models.guidance import guidance_scales, guided_logits, with_null_condition
from autoregressive.models.schedules import SCHEDULES
from autoregressive.models.text_condition import text_attention_mask
from tests import golden
from tests.autoregressive.models.test_gpt import formula_captions
from tests.autoregressive.models.tiny import captions, formula_model, from_golden, random_model


@pytest.fixture
def step_logits(monkeypatch) -> list[Tensor]:
    """The logits (B, V) handed to the sampler, one entry per token."""
    seen: list[Tensor] = []
    real = generate_module.sample

    def record(logits: Tensor, **options):
        seen.append(logits[:, -1].clone())
        return real(logits, **options)

    monkeypatch.setattr(generate_module, "sample", record)
    return seen


@golden.cases("gpt.generate")
def test_generation_matches_the_golden(case, step_logits):
    model, params = from_golden(case), case.params
    if "seed_before_generate" in params:
        torch.manual_seed(params["seed_before_generate"])
    options = {name: params[name] for name in ("cfg_scale", "cfg_interval") if name in params}
    emb_masks = case.tensors.get("emb_masks")
    tokens = generate(model, case.tensors["cond"], params["max_new_tokens"], emb_masks, **options, **params["sampling"])
    logits = torch.stack(step_logits, dim=1)
    case.check(
        {
            "tokens": tokens,
            "step_logits": logits,
            "step_logits_slice": logits[..., :: params.get("step_logits_stride", 1)],
        }
    )
    assert tokens.dtype == torch.int32


def cached_logits(model, cond: Tensor, tokens: Tensor, cache: DecodeCache | None) -> tuple[Tensor, Tensor]:
    """Prefill logits (B, P, V), and those after each given token (B, n, V)."""
    prefix = model.cls_token_num
    first, _ = model(None, cond, torch.arange(prefix), cache=cache)
    steps = [
        model(tokens[:, i : i + 1], None, torch.tensor([prefix + i]), cache=cache)[0] for i in range(tokens.shape[1])
    ]
    return first, torch.cat(steps, dim=1)


@pytest.mark.parametrize("own_caches", [False, True])
@golden.cases("gpt.cached")
def test_cached_forward_matches_the_golden(case, own_caches):
    model = from_golden(case)
    cond, tokens, emb_masks = (case.tensors.get(name) for name in ("cond", "tokens", "emb_masks"))
    batch, positions = len(cond), model.cls_token_num + 16
    full_mask = key_mask = cache = None
    if emb_masks is not None:
        key_mask = torch.cat([emb_masks.bool(), torch.ones(batch, 16, dtype=torch.bool)], dim=1)
        full_mask = text_attention_mask(key_mask)
    if own_caches:
        model.setup_caches(max_batch_size=batch, max_seq_length=positions, dtype=torch.float32)
        if full_mask is not None:
            model.causal_mask[:, :positions, :positions] = full_mask[:, 0]
    else:
        cache = DecodeCache.allocate(model.config, batch, positions, torch.float32, cond.device, key_mask)
    with torch.no_grad():
        full, _ = model(tokens, cond, torch.arange(positions), mask=full_mask)
        first, rest = cached_logits(model, cond, tokens, cache)
    case.check({"full_logits": full, "prefill_logits": first, "decode_logits": rest})


PUBLISHED_C2I = {
    (1.0, -1): [
        [6, 46, 3, 16, 24, 59, 24, 46, 20, 24, 3, 31, 28, 24, 13, 15],
        [59, 62, 24, 50, 53, 33, 54, 53, 60, 3, 35, 49, 53, 24, 20, 59],
    ],
    (3.0, -1): [
        [6, 6, 9, 55, 20, 3, 55, 55, 20, 3, 1, 20, 31, 20, 3, 2],
        [17, 59, 54, 8, 22, 54, 19, 2, 54, 0, 36, 2, 54, 0, 5, 48],
    ],
    (3.0, 4): [
        [6, 6, 9, 55, 20, 3, 24, 20, 20, 20, 20, 20, 20, 20, 20, 20],
        [17, 59, 54, 8, 22, 54, 36, 2, 54, 14, 32, 2, 54, 36, 2, 4],
    ],
}
PUBLISHED_T2I = {
    1.0: [
        [47, 47, 47, 47, 47, 47, 47, 47, 47, 47, 47, 47, 47, 25, 47, 47],
        [1, 22, 34, 57, 0, 47, 0, 58, 26, 22, 22, 22, 0, 58, 26, 22],
    ],
    3.0: [
        [32, 47, 58, 13, 47, 13, 13, 34, 63, 62, 2, 13, 29, 13, 36, 36],
        [1, 25, 22, 34, 57, 22, 57, 0, 22, 44, 9, 47, 0, 22, 44, 22],
    ],
}
PUBLISHED_SEEDED = [
    (
        {"cfg_scale": 2.0, "temperature": 0.9, "top_k": 20, "top_p": 0.95},
        [
            [6, 40, 48, 54, 49, 59, 13, 10, 8, 3, 55, 41, 41, 20, 37, 20],
            [17, 59, 9, 32, 57, 16, 63, 44, 54, 52, 51, 6, 1, 39, 47, 27],
        ],
    ),
    (
        {"cfg_scale": 1.0},
        [
            [58, 40, 48, 52, 49, 59, 42, 11, 52, 3, 55, 56, 40, 27, 41, 27],
            [29, 59, 56, 41, 57, 16, 23, 33, 29, 52, 45, 43, 1, 26, 7, 17],
        ],
    ),
]


@pytest.mark.parametrize(("guidance", "expected"), PUBLISHED_C2I.items())
def test_formula_weights_give_the_published_greedy_tokens(guidance, expected):
    scale, interval = guidance
    tokens = generate(
        formula_model(), torch.tensor([1, 9]), 16, cfg_scale=scale, cfg_interval=interval, sample_logits=False
    )
    assert tokens.tolist() == expected


@pytest.mark.parametrize(("scale", "expected"), PUBLISHED_T2I.items())
def test_formula_weights_give_the_published_greedy_tokens_for_captions(scale, expected):
    model = formula_model(model_type="t2i", cls_token_num=120)
    features, emb_masks = formula_captions()
    tokens = generate(model, features, 16, emb_masks, cfg_scale=scale, sample_logits=False)
    assert tokens.tolist() == expected


@pytest.mark.parametrize(("options", "expected"), PUBLISHED_SEEDED)
def test_formula_weights_give_the_published_seeded_tokens(options, expected):
    model = formula_model()
    torch.manual_seed(0)
    assert generate(model, torch.tensor([1, 9]), 16, **options).tolist() == expected


@pytest.mark.parametrize(("guidance", "expected"), PUBLISHED_C2I.items())
def test_building_blocks_on_the_models_own_caches_give_the_published_tokens(guidance, expected):
    """Code that calls setup_caches, prefill and decode_n_tokens itself, as the established samplers do."""
    model, (scale, interval) = formula_model(), guidance
    cond = with_null_condition(model, torch.tensor([1, 9])) if scale > 1 else torch.tensor([1, 9])
    model.setup_caches(max_batch_size=len(cond), max_seq_length=17, dtype=model.tok_embeddings.weight.dtype)
    with torch.no_grad():
        first = prefill(model, cond, torch.arange(1), scale, sample_logits=False)
        rest = decode_n_tokens(model, first, torch.tensor([1]), 15, scale, interval, sample_logits=False)
    assert torch.cat([first, rest], dim=1).tolist() == expected


def full_forward_tokens(model, cond: Tensor, emb_masks: Tensor | None, scales: list[float]) -> Tensor:
    """Greedy tokens by a complete uncached forward per token, one for each of `scales`: what the cache must give."""
    both = with_null_condition(model, cond)
    tokens = torch.empty(len(cond), 0, dtype=torch.long)
    for step, scale in enumerate(scales):
        positions = model.cls_token_num + step
        mask = None
        if emb_masks is not None:
            text = emb_masks.bool().repeat(2, 1)
            mask = text_attention_mask(torch.cat([text, text.new_ones(len(both), step)], dim=1))
        logits, _ = model(torch.cat([tokens, tokens]), both, torch.arange(positions), mask=mask)
        tokens = torch.cat([tokens, guided_logits(logits[:, -1], scale).argmax(-1, keepdim=True)], dim=1)
    return tokens


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (6, 3)]),
    grid=st.integers(1, 4),
    prefix=st.integers(0, 5),
    scale=st.sampled_from([1.0, 1.5, 4.0]),
    interval=st.sampled_from([-1, 0, 2]),
    schedule=st.sampled_from(SCHEDULES),
    start=st.integers(0, 3),
    data=st.data(),
)
@torch.no_grad()
def test_greedy_decoding_equals_the_full_forward(
    seed, batch, heads, grid, prefix, scale, interval, schedule, start, data
):
    n_head, n_kv_head = heads
    shape = {"dim": 8 * n_head, "n_head": n_head, "n_kv_head": n_kv_head, "block_size": grid**2}
    if prefix:  # captions of that many positions
        model = random_model(seed, model_type="t2i", cls_token_num=prefix, **shape).double()
        lengths = data.draw(st.lists(st.integers(1, prefix), min_size=batch, max_size=batch))
        cond, emb_masks = captions(batch, lengths, prefix)
        cond = cond.double()
    else:
        model, emb_masks = random_model(seed, **shape).double(), None
        cond = torch.randint(5, (batch,))
    count = data.draw(st.integers(1, grid**2))
    options = {"cfg_scale": scale, "cfg_interval": interval, "cfg_schedule": schedule, "cfg_start": start}
    tokens = generate(model, cond, count, emb_masks, sample_logits=False, **options)
    scales = guidance_scales(grid**2, scale, interval, schedule, start=start)[:count]
    expected = full_forward_tokens(model, cond, emb_masks, scales)
    assert torch.equal(tokens, expected.int())


def generators(seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
@pytest.mark.parametrize("interval", [-1, 3])
def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(model_type, interval):
    emb_masks = None
    if model_type == "t2i":
        model = random_model(model_type="t2i", cls_token_num=4)
        cond, emb_masks = captions(4, [1, 2, 3, 4], 4)
    else:
        model, cond = random_model(), torch.tensor([0, 1, 1, 4])
    options = {"cfg_scale": 2.0, "cfg_interval": interval, "temperature": 1.1, "top_k": 30, "top_p": 0.97}
    batch = generate(model, cond, 9, emb_masks, generators=generators([7, 8, 9, 10]), **options)
    for i in range(4):
        masks = None if emb_masks is None else emb_masks[i : i + 1]
        single = generate(model, cond[i : i + 1], 9, masks, generators=generators([7 + i]), **options)
        assert torch.equal(single[0], batch[i])
    assert len({tuple(row) for row in batch.tolist()}) > 1
    two = generate(
        model, cond[[1, 1]], 9, None if emb_masks is None else emb_masks[[1, 1]],
        generators=generators([8, 99]), **options,
    )  # fmt: skip
    assert torch.equal(two[0], batch[1]) and not torch.equal(two[1], batch[1])


def test_one_generator_draws_what_the_global_generator_draws_for_one_image():
    model, label = random_model(), torch.tensor([2])
    torch.manual_seed(5)
    legacy = generate(model, label, 9, top_k=20)
    assert torch.equal(generate(model, label, 9, top_k=20, generators=generators([5])), legacy)


def test_own_generators_leave_the_global_one_alone():
    model, before = random_model(), torch.get_rng_state()
    generate(model, torch.tensor([2, 3]), 9, generators=generators([5, 6]))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_multinomial_per_token_over_the_batch(monkeypatch):
    model, calls, real = random_model(), [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, **k: calls.append((p.shape, p.dtype)) or real(p, **k))
    generate(model.bfloat16(), torch.tensor([2, 3, 4]), 7, cfg_scale=3.0, cfg_interval=2)
    assert calls == [((3, 50), torch.float32)] * 7


def test_generation_leaves_the_model_as_it_was():
    model = random_model().train()
    model.layers[0].eval()
    keys, modules, attributes = list(model.state_dict()), list(model.modules()), set(vars(model))
    modes = [module.training for module in modules]
    tokens = torch.randint(50, (2, 9))
    model.cls_embedding.dropout_prob = 0.0
    before, _ = model(tokens[:, :-1], torch.tensor([1, 2]), targets=tokens)
    model.cls_embedding.dropout_prob = 0.1
    generate(model, torch.tensor([1, 2]), 9, cfg_scale=2.0)
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules and set(vars(model)) == attributes
    assert [module.training for module in modules] == modes
    model.cls_embedding.dropout_prob = 0.0
    after, loss = model(tokens[:, :-1], torch.tensor([1, 2]), targets=tokens)
    assert torch.equal(before, after)
    loss.backward()
    copy.deepcopy(model)


def test_the_mode_is_restored_when_generation_fails():
    model = random_model().train()
    with pytest.raises(TypeError):
        generate(model, torch.tensor([1]), 2, no_such_option=1)
    assert model.training


def test_setup_caches_leaves_state_dict_training_and_deepcopy_alone():
    model = random_model()
    keys = list(model.state_dict())
    model.setup_caches(max_batch_size=2, max_seq_length=10, dtype=torch.float32)
    assert (model.max_batch_size, model.max_seq_length) == (2, 16)
    assert model.causal_mask.shape == (2, 16, 16) and model.causal_mask.dtype == torch.bool
    with torch.no_grad():
        prefill(model, torch.tensor([1, 2]), torch.arange(1), 1.0)
    tokens = torch.randint(50, (2, 9))
    _, loss = copy.deepcopy(model).train()(tokens[:, :-1], torch.tensor([1, 2]), targets=tokens)
    loss.backward()
    assert list(model.state_dict()) == keys and not list(model.buffers())


def test_setup_caches_follows_the_device_of_the_weights():
    model = random_model().to("meta")
    model.setup_caches(max_batch_size=2, max_seq_length=10, dtype=torch.float32)
    where = {"dtype": torch.long, "device": "meta"}
    logits, _ = model(torch.zeros(2, 1, **where), None, torch.zeros(1, **where))
    assert logits.is_meta and model.causal_mask.is_meta and model.freqs_cis.is_meta


def test_float32_caches_work_under_autocast():
    model = random_model()
    model.setup_caches(max_batch_size=2, max_seq_length=10, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = prefill(model, torch.tensor([1, 2]), torch.arange(1), 1.0, sample_logits=False)
        rest = decode_n_tokens(model, first, torch.tensor([1]), 8, 1.0, -1, sample_logits=False)
    assert rest.shape == (2, 8)


def test_a_full_cache_takes_no_more():
    model = random_model()
    cache = new_cache(model)
    with torch.no_grad(), pytest.raises(ValueError, match="too few for 2"):
        model(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]), cache=cache)


def test_generation_runs_in_evaluation_mode_without_gradients():
    model = random_model(token_dropout_p=0.9, class_dropout_prob=0.9)
    expected = generate(model, torch.tensor([1, 2]), 9, sample_logits=False)
    tokens = generate(model.train(), torch.tensor([1, 2]), 9, sample_logits=False)
    assert torch.equal(tokens, expected) and not tokens.requires_grad


def test_temperature_changes_over_the_image(monkeypatch):
    model, seen, real = random_model(), [], generate_module.sample
    record = lambda logits, **options: seen.append(options["temperature"]) or real(logits, **options)  # noqa: E731
    monkeypatch.setattr(generate_module, "sample", record)
    generate(model, torch.tensor([1]), 9, temperature=1.6, temperature_end=0.8)
    assert seen == pytest.approx([1.6 - 0.1 * i for i in range(9)])
    cold = generate(model, torch.tensor([1]), 9, temperature=1.0, temperature_end=0.0, generators=generators([3]))
    warm = generate(model, torch.tensor([1]), 9, generators=generators([3]))
    assert torch.equal(cold[:, 0], warm[:, 0]) and not torch.equal(cold, warm)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_given_tokens_are_put_in_seen_by_later_ones_and_cost_no_randomness(scale):
    model, labels, options = random_model(), torch.tensor([1, 3]), {"cfg_scale": scale}
    free = generate(model, labels, 9, generators=generators([5, 6]), **options)
    none = torch.full((2, 9), -1)
    assert torch.equal(generate(model, labels, 9, given=none, generators=generators([5, 6]), **options), free)
    assert torch.equal(generate(model, labels, 9, given=free, generators=generators([7, 8]), **options), free)
    half = none.clone()
    half[:, ::2] = free[:, ::2].long()  # the drawn ones see what they saw before and draw the same
    assert torch.equal(generate(model, labels, 9, given=half, generators=generators([5, 6]), **options), free)
    other = none.clone()
    other[0, 4] = (free[0, 4].long() + 1) % 50
    changed = generate(model, labels, 9, given=other, generators=generators([5, 6]), **options)
    assert torch.equal(changed[1], free[1]) and torch.equal(changed[0, :4], free[0, :4])
    assert changed[0, 4] == other[0, 4] and not torch.equal(changed[0, 5:], free[0, 5:])


def test_given_tokens_that_do_not_fit_are_refused():
    model, label = random_model(), torch.tensor([1])
    for wrong, message in [(torch.zeros(1, 8), "integers"), (torch.zeros(1, 8, dtype=torch.long), r"\(1, 9\)"),
                           (torch.full((1, 9), 50), "to 49"), (torch.full((1, 9), -2), "got -2")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            generate(model, label, 9, given=wrong)


def test_one_token_and_any_number_up_to_the_block_size():
    model, label = random_model(), torch.tensor([1, 3])
    whole = generate(model, label, 9, cfg_scale=2.0, sample_logits=False)
    for count in (1, 2, 8):
        assert torch.equal(generate(model, label, count, cfg_scale=2.0, sample_logits=False), whole[:, :count])
    for count in (0, 10):
        with pytest.raises(ValueError, match="block_size"):
            generate(model, label, count)


def test_guidance_needs_a_null_class():
    model = random_model(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="class_dropout_prob"):
        generate(model, torch.tensor([1]), 3, cfg_scale=2.0)
    assert generate(model, torch.tensor([1]), 3).shape == (1, 3)


@pytest.mark.parametrize("label", [-1, 6])
def test_class_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match="class labels are 0 to 5"):
        generate(random_model(), torch.tensor([1, label]), 3)


def test_the_null_class_is_a_label():
    model = random_model()
    tokens = generate(model, torch.tensor([5, 5]), 9, cfg_scale=3.0, sample_logits=False)
    assert torch.equal(tokens, generate(model, torch.tensor([5, 5]), 9, sample_logits=False))


def test_arguments_that_do_not_fit_are_refused():
    model = random_model()
    with pytest.raises(ValueError, match="one generator per image"):
        generate(model, torch.tensor([1, 2]), 3, generators=generators([1]))
    with pytest.raises(ValueError, match="emb_masks"):
        generate(model, torch.tensor([1]), 3, torch.ones(1, 1))
    with pytest.raises(ValueError, match="int64"):
        generate(model, torch.tensor([1.0]), 3)
    text_model = random_model(model_type="t2i", cls_token_num=4)
    with pytest.raises(ValueError, match="emb_masks"):
        generate(text_model, torch.zeros(2, 4, 6), 3, torch.ones(2, 3))
    with pytest.raises(ValueError, match="cls_token_num"):
        generate(text_model, torch.zeros(2, 3, 6), 3)


def test_long_captions_are_cut_like_in_training():
    model = random_model(model_type="t2i", cls_token_num=4)
    features, emb_masks = torch.randn(2, 6, 6), torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    options = {"cfg_scale": 2.0, "sample_logits": False}
    long = generate(model, features, 9, emb_masks, **options)
    assert torch.equal(long, generate(model, features[:, :4], 9, emb_masks[:, :4], **options))


def test_captions_without_a_mask_are_all_text():
    model = random_model(model_type="t2i", cls_token_num=4)
    features = torch.randn(2, 4, 6)
    options = {"cfg_scale": 2.0, "sample_logits": False}
    masked = generate(model, features, 9, torch.ones(2, 4), **options)
    assert torch.equal(generate(model, features, 9, **options), masked)


@pytest.fixture
def cache_log(monkeypatch) -> list[DecodeCache]:
    """The caches that generation allocates."""
    made: list[DecodeCache] = []
    real = DecodeCache.allocate.__func__
    monkeypatch.setattr(
        DecodeCache, "allocate", classmethod(lambda cls, *a, **k: made.append(real(cls, *a, **k)) or made[-1])
    )
    return made


def test_caches_are_allocated_once_and_fit_exactly(cache_log):
    model = random_model(n_kv_head=2)
    generate(model, torch.tensor([1, 2, 3]), 5, cfg_scale=2.0)
    (cache,) = cache_log
    assert len(cache.layers) == 2
    assert cache.layers[0].k_cache.shape == (6, 2, 1 + 4, 8)  # kv heads; the last token is never fed
    assert cache.length == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_caches_follow_the_compute_dtype(cache_log, dtype):
    generate(random_model().to(dtype), torch.tensor([1, 2]), 4, cfg_scale=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        generate(random_model(), torch.tensor([1, 2]), 4, cfg_scale=2.0)
        features, emb_masks = captions(2, [1, 4], 4)
        generate(random_model(model_type="t2i", cls_token_num=4), features, 4, emb_masks, cfg_scale=2.0)
    assert [cache.layers[0].v_cache.dtype for cache in cache_log] == [dtype, torch.bfloat16, torch.bfloat16]


def test_caption_features_of_another_dtype_are_cast():
    model = random_model(model_type="t2i", cls_token_num=4).bfloat16()
    features, emb_masks = captions(2, [1, 4], 4)
    options = {"cfg_scale": 2.0, "sample_logits": False}
    tokens = generate(model, features, 9, emb_masks, **options)
    assert torch.equal(tokens, generate(model, features.bfloat16(), 9, emb_masks, **options))


@pytest.mark.parametrize(("interval", "guided_steps"), [(-1, 8), (0, 1), (3, 4), (3.5, 4), (-0.5, 0), (100, 8)])
def test_the_null_half_is_computed_only_while_guided(interval, guided_steps):
    model, rows = random_model(), []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[1] if args[0] is None else args[0])))
    generate(model, torch.tensor([1, 2]), 9, cfg_scale=2.0, cfg_interval=interval)
    assert rows == [4] + [4] * guided_steps + [2] * (8 - guided_steps)


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_attention_reads_the_filled_positions_alone(monkeypatch, model_type):
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        seen.append((q.shape[2], k.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    if model_type == "c2i":
        generate(random_model(n_layer=1), torch.tensor([1, 2]), 4)
        assert seen == [(1, 1, None), (1, 2, None), (1, 3, None), (1, 4, None)]
    else:
        features, emb_masks = captions(2, [1, 4], 4)
        model = random_model(n_layer=1, model_type="t2i", cls_token_num=4)
        generate(model, features, 3, emb_masks)
        assert seen == [(4, 4, (2, 1, 4, 4)), (1, 5, (2, 1, 1, 5)), (1, 6, (2, 1, 1, 6))]


def test_progress_names_every_token_once():
    seen: list[int] = []
    generate(random_model(), torch.tensor([1]), 5, on_token=seen.append)
    assert seen == [0, 1, 2, 3, 4]


def test_image_tokens_can_be_prefilled_with_the_condition():
    model = random_model(model_type="t2i", cls_token_num=3)
    features, emb_masks = captions(2, [1, 3], 3)
    given_tokens = torch.randint(50, (2, 4))
    key_mask = torch.cat([emb_masks.bool(), torch.ones(2, 9, dtype=torch.bool)], dim=1)
    cache = DecodeCache.allocate(model.config, 2, 12, torch.float32, torch.device("cpu"), key_mask)
    with torch.no_grad():
        whole, _ = model(given_tokens, features, torch.arange(7), mask=text_attention_mask(key_mask[:, :7]))
        model(given_tokens[:, :1], features, cache=cache)
        rest, _ = model(given_tokens[:, 1:], None, cache=cache)  # three positions behind the four cached
    torch.testing.assert_close(rest, whole[:, 4:])


def test_decode_one_token_returns_the_probabilities_it_drew_from():
    model = random_model()
    cache = DecodeCache.allocate(model.config, 2, 2, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        first = prefill(model, torch.tensor([1, 2]), torch.arange(1), 1.0, cache=cache)
        token, probs = decode_one_token(model, first, torch.tensor([1]), 1.0, True, cache=cache, top_k=3)
    assert token.shape == (2, 1) and (probs > 0).sum(-1).tolist() == [3, 3]
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))


def test_every_step_is_guided_by_the_formula(step_logits):
    model, label = random_model(), torch.tensor([2])
    generate(model, label, 1, cfg_scale=3.0, sample_logits=False)
    with torch.no_grad():
        cond, _ = model(None, label, torch.arange(1), cache=new_cache(model))
        null, _ = model(None, torch.tensor([5]), torch.arange(1), cache=new_cache(model))
    torch.testing.assert_close(step_logits[0], (null + 3.0 * (cond - null))[:, 0])
    assert math.isfinite(step_logits[0].sum())


def new_cache(model) -> DecodeCache:
    return DecodeCache.allocate(model.config, 1, 1, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_tokens_appear_in_out_as_they_are_drawn(scale):
    model, out, seen = random_model(), torch.full((2, 6), -1, dtype=torch.int32), []
    options = {"cfg_scale": scale, "sample_logits": False}
    tokens = generate(model, torch.tensor([1, 2]), 6, on_token=lambda _: seen.append(out.clone()), out=out, **options)
    assert torch.equal(tokens, out) and torch.equal(tokens, generate(model, torch.tensor([1, 2]), 6, **options))
    for step, then in enumerate(seen):
        assert torch.equal(then[:, : step + 1], tokens[:, : step + 1]) and (then[:, step + 1 :] == -1).all()
    with pytest.raises(ValueError, match=r"expected out int32 \(2, 6\)"):
        generate(model, torch.tensor([1, 2]), 6, out=torch.zeros(2, 5, dtype=torch.int32))


def test_decoding_on_a_gpu_keeps_away_from_cudnn_attention():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with decode_attention_backends(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with decode_attention_backends(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_every_token_is_generated_inside_that_context(monkeypatch):
    events = []

    @contextlib.contextmanager
    def noted(device):
        events.append(device.type)
        yield
        events.append("left")

    monkeypatch.setattr(generate_module, "decode_attention_backends", noted)
    generate(random_model(), torch.tensor([1]), 3, sample_logits=False, on_token=events.append)
    assert events == ["cpu", 0, 1, 2, "left"]
