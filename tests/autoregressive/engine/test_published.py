"""Every engine decodes the published greedy tokens, which tests/autoregressive/models/test_generate.py explains."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch

from autoregressive.engine.native import NativeEngine
from autoregressive.engine.static import StaticEngine
from autoregressive.models.generate import generate
from tests.autoregressive.models.test_generate import PUBLISHED_C2I, PUBLISHED_T2I, formula_captions
from tests.autoregressive.models.tiny import formula_model

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler here"
)
engines = pytest.mark.parametrize(
    "engine",
    [
        pytest.param(NativeEngine, marks=needs_compiler, id="native"),
        pytest.param(partial(StaticEngine, compile_blocks=False), id="static"),
    ],
)


@engines
@pytest.mark.parametrize(("guidance", "expected"), PUBLISHED_C2I.items())
def test_published_greedy_tokens(engine, guidance, expected):
    scale, interval = guidance
    decoder = engine(formula_model())
    options = {"cfg_scale": scale, "cfg_interval": interval, "sample_logits": False}
    for _ in range(2):  # the second time in the caches of the first
        assert generate(decoder, torch.tensor([1, 9]), 16, **options).tolist() == expected


@engines
@pytest.mark.parametrize(("scale", "expected"), PUBLISHED_T2I.items())
def test_published_greedy_tokens_for_captions(engine, scale, expected):
    decoder = engine(formula_model(model_type="t2i", cls_token_num=120))
    features, masks = formula_captions()
    assert generate(decoder, features, 16, masks, cfg_scale=scale, sample_logits=False).tolist() == expected
