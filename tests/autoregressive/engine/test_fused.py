"""The engine of Triton kernels gives the tokens of the plain one; interpreted here, compiled where a GPU is.

The functions `check_...` take the device to compute on.
"""

from __future__ import annotations

import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.noise import ImageNoise
from tests.autoregressive.engine.kernels.interpreted import run_interpreted
from tests.autoregressive.models.tiny import captions, random_model


def engine_of(model, quantize="none"):
    """Imports Triton, which reads at its own import whether it is to interpret."""
    from autoregressive.engine.build import make_engine

    engine = make_engine(model, "triton", quantize)
    assert engine.name == "triton"
    return engine


def same_tokens(engine, model, cond, count, masks=None, seeds=None, **options):
    """Whether both engines generate the same."""
    seeds = range(len(cond)) if seeds is None else seeds
    tokens, expected = (
        generate(m, cond, count, masks, generators=ImageNoise(seeds, cond.device), **options) for m in (engine, model)
    )
    return torch.equal(tokens, expected)


def check_classes_with_every_option(device: str = "cpu") -> None:
    """Guidance with an interval, filters, forced tokens, schedules, greedy; batches one after another."""
    model = random_model(n_kv_head=2, block_size=9).to(device)
    engine = engine_of(model)
    for labels, options in (
        ([1, 2, 3], {"cfg_scale": 2.0, "top_k": 20}),
        ([4], {"cfg_scale": 3.0, "cfg_interval": 3, "top_p": 0.8}),
        ([1, 0], {"min_p": 0.02, "temperature_end": 0.5}),
        ([2, 1, 3], {"cfg_scale": 4.0, "cfg_schedule": "linear", "cfg_start": 2, "sample_logits": False}),
    ):
        cond = torch.tensor(labels, device=device)
        forced = torch.randint(-1, 50, (len(labels), 9), device=device)
        for given in (None, forced):
            assert same_tokens(engine, model, cond, 9, given=given, **options), (labels, options)


def check_captions_of_different_lengths(device: str = "cpu") -> None:
    """Left-padded captions, with guidance and in batches that are filled up."""
    model = random_model(3, model_type="t2i", cls_token_num=5, block_size=9).to(device)
    engine = engine_of(model)
    for lengths in ([5, 2, 1], [3, 4]):
        features, mask = captions(len(lengths), lengths, 5)
        cond, mask = features.to(device), mask.to(device)
        assert same_tokens(engine, model, cond, 9, mask, cfg_scale=3.0, top_k=30)
        assert same_tokens(engine, model, cond, 6, mask)
    holes = mask.clone()
    holes[0, -1] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        generate(engine, cond, 4, holes, generators=ImageNoise(range(len(cond)), device))


def check_more_rows_than_skinny_products_take(device: str = "cpu") -> None:
    """Above 64 rows PyTorch multiplies the matrices."""
    model = random_model().to(device)
    cond = torch.arange(40, device=device) % 5
    assert same_tokens(engine_of(model), model, cond, 4, cfg_scale=2.0, top_k=20)


def check_int8_and_odd_heads(device: str = "cpu") -> None:
    """Heads of 20 numbers, which the cache pads; int8 weights give nearly the same logits."""
    model = random_model(dim=40, n_head=2, multiple_of=8).to(device)
    cond = torch.tensor([1, 2], device=device)
    assert same_tokens(engine_of(model), model, cond, 9, cfg_scale=2.0)
    tokens = generate(engine_of(model, "int8"), cond, 9, sample_logits=False)
    expected = generate(engine_of(model), cond, 9, sample_logits=False)
    assert (tokens[:, :3] == expected[:, :3]).all()


def test_classes_with_every_option():
    run_interpreted(__name__, "check_classes_with_every_option")


def test_captions_of_different_lengths():
    run_interpreted(__name__, "check_captions_of_different_lengths")


def test_more_rows_than_skinny_products_take():
    run_interpreted(__name__, "check_more_rows_than_skinny_products_take")


def test_int8_and_odd_heads():
    run_interpreted(__name__, "check_int8_and_odd_heads")


def test_without_a_gpu_the_engine_says_why():
    with pytest.raises(ValueError, match="run on a GPU, the model is on cpu"):
        engine_of(random_model())
