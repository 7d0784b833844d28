"""Temperature, top-k, top-p and the draw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.models.sampling import (
    draw,
    logits_to_probs,
    min_p_filtering,
    sample,
    temperatures,
    top_k_top_p_filtering,
)
from tests import golden


@golden.cases("gpt.filter")
def test_filtering_matches_the_golden(case):
    logits = case.tensors["logits"]
    filtered = {name: top_k_top_p_filtering(logits, **options) for name, options in case.params["cases"].items()}
    case.check(
        {
            **{f"filtered.{name}": values for name, values in filtered.items()},
            "kept_per_row": {name: values.isfinite().sum(-1).tolist() for name, values in filtered.items()},
        }
    )


@golden.cases("gpt.sample_probs")
def test_sampler_matches_the_golden(case):
    logits, outputs = case.tensors["logits"], {}
    for name, options in case.params["cases"].items():
        outputs[f"idx.{name}"], outputs[f"probs.{name}"] = sample(logits, sample_logits=False, **options)
    for name, options in case.params["seeded"].items():
        options = dict(options)
        torch.manual_seed(options.pop("seed"))
        outputs[f"seeded_idx.{name}"], _ = sample(logits, **options)
    case.check(outputs)


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"top_k": 3}, range(3, 4)), ({"top_p": 0.5}, range(1, 20)), ({"top_k": 3, "top_p": 0.5}, range(1, 4))],
)
def test_filtering_leaves_the_callers_logits_alone(options, kept):
    logits = torch.randn(2, 20)
    before = logits.clone()
    filtered = top_k_top_p_filtering(logits, **options)
    assert torch.equal(logits, before)
    assert all(count in kept for count in filtered.isfinite().sum(-1).tolist())


def test_filter_value_replaces_the_dropped_ones():
    kept = top_k_top_p_filtering(torch.tensor([[1.0, 3.0, 2.0]]), top_k=1, filter_value=-7.0)
    assert kept.tolist() == [[-7.0, 3.0, -7.0]]


def test_top_p_looks_at_what_comes_before():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    kept = lambda top_p: top_k_top_p_filtering(probs.log(), top_p=top_p).isfinite().sum().item()  # noqa: E731
    assert [kept(p) for p in (0.0, 0.4, 0.49, 0.6, 0.74, 0.8)] == [1, 1, 1, 2, 2, 3]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(0, 25), top_p=st.floats(0, 1))
def test_what_is_kept_is_the_best_and_no_more_than_asked_for(seed, top_k, top_p):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    kept = top_k_top_p_filtering(logits, top_k=top_k, top_p=top_p).isfinite()
    assert (kept.gather(1, logits.argmax(-1, keepdim=True))).all()
    assert (kept.sum(-1) <= (min(top_k, 20) or 20)).all()
    worst_kept = logits.masked_fill(~kept, torch.inf).min(-1).values
    best_dropped = logits.masked_fill(kept, -torch.inf).max(-1).values
    assert (worst_kept >= best_dropped).all()


def test_logits_to_probs_works_with_its_defaults():
    logits = torch.randn(2, 5)
    torch.testing.assert_close(logits_to_probs(logits), logits.softmax(-1))
    torch.testing.assert_close(logits_to_probs(logits, temperature=2.0), (logits / 2).softmax(-1))


def test_a_generator_per_row_draws_like_multinomial_from_it():
    probs = torch.rand(3, 1000).softmax(-1)
    rows = draw(probs, [torch.Generator().manual_seed(s) for s in (3, 4, 5)])
    for i, seed in enumerate((3, 4, 5)):
        own = torch.multinomial(probs[i : i + 1], 1, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(rows[i : i + 1], own)


def test_draws_follow_the_probabilities():
    probs = torch.tensor([[0.1, 0.0, 0.6, 0.3]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(probs, [generator]) for _ in range(4000)]).flatten()
    share = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(share, probs[0], atol=0.03, rtol=0)
    assert share[1] == 0


def test_draw_refuses_a_wrong_number_of_generators():
    with pytest.raises(ValueError, match="got 2 for 1 images"):
        draw(torch.ones(1, 3), [torch.Generator(), torch.Generator()])


def test_min_p_is_relative_to_the_likeliest():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]).log()
    kept = lambda min_p: min_p_filtering(logits, min_p).isfinite().sum(-1).tolist()  # noqa: E731
    assert [kept(p) for p in (0.0, 0.2, 0.3, 0.6, 1.0)] == [[4, 4], [4, 4], [2, 4], [1, 4], [1, 4]]
    assert logits.isfinite().all()
    probs = logits_to_probs(logits, min_p=0.3)
    torch.testing.assert_close(probs[0], torch.tensor([2 / 3, 1 / 3, 0, 0]))
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="0 to 1"):
            min_p_filtering(logits, wrong)


def test_temperatures_of_each_token():
    assert temperatures(3, 0.9, None) == [0.9, 0.9, 0.9]
    assert temperatures(3, 1.5, 0.5) == [1.5, 1.0, 0.5]
    assert temperatures(3, 1.5, 0.5, "constant") == [0.5, 0.5, 0.5]
