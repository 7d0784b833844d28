"""Which engine a name gives, and what happens without a compiler."""

from __future__ import annotations

import logging

import pytest
import torch

from autoregressive.engine import compiler
from autoregressive.engine.build import add_engine_args, make_engine
from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from autoregressive.sample.pipeline import add_model_args, engine_name
from tests.autoregressive.engine.test_native import needs_compiler
from tests.autoregressive.models.tiny import random_model
from utils.args import make_parser


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    """An empty cache folder, and nothing loaded."""
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    compiler.load.cache_clear()
    yield tmp_path
    compiler.load.cache_clear()


def test_names():
    model = random_model()
    assert make_engine(model, "eager").name == "eager"
    with pytest.raises(ValueError, match=r"engines are auto, eager.*got 'fast'"):
        make_engine(model, "fast")
    with pytest.raises(ValueError, match="needs a native, triton or compiled engine"):
        make_engine(model, "eager", "int8")
    with pytest.raises(ValueError, match="formats of caches auto, int8, fp8; got 'eager', 'none' and 'int4'"):
        make_engine(model, "eager", "none", "int4")
    for engine, name in (("eager", "int8"), ("eager", "fp8"), ("compiled", "int8"), ("compiled", "fp8")):
        with pytest.raises(ValueError, match=f"{name} needs a triton or native engine; {engine} keeps the model's"):
            make_engine(model, engine, "none", name)
    for engine in ("native", "auto"):
        with pytest.raises(ValueError, match="fp8 needs the triton engine and its GPU; the native engine has int8"):
            make_engine(model, engine, "none", "fp8")
    flags = make_parser(None)
    add_engine_args(flags)
    assert vars(flags.parse_args([])) == {"engine": "auto", "quantize": "none", "kv_cache_dtype": "auto"}


@needs_compiler
def test_automatic_is_native_on_a_cpu():
    assert make_engine(random_model()).name == "native"
    assert make_engine(random_model().bfloat16(), quantize="int8").quantize == "int8"


def test_without_a_compiler_automatic_is_eager_and_says_why(fresh_compiler, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(fresh_compiler))
    monkeypatch.delenv("CXX", raising=False)
    model = random_model()
    with caplog.at_level(logging.WARNING, logger="llamagen"):
        assert make_engine(model).name == "eager"
    assert "no C++ compiler found" in caplog.text
    with pytest.raises(ValueError, match=r"no C\+\+ compiler found"):
        make_engine(model, "native")
    with pytest.raises(ValueError, match="int8 needs the native engine: no C"):
        make_engine(model, quantize="int8")


def test_a_compiler_that_fails_is_named(fresh_compiler, monkeypatch):
    broken = fresh_compiler / "broken-cxx"
    broken.write_text("#!/bin/sh\necho 'step.cpp:1: error: cannot do this' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(compiler.CannotCompile, match="cannot do this"):
        compiler.load()
    assert list((fresh_compiler / "cache").iterdir()) == []


def test_half_precision_on_a_cpu_is_computed_eagerly(caplog):
    with caplog.at_level(logging.WARNING, logger="llamagen"):
        assert make_engine(random_model().half()).name == "eager"
    assert "torch.float16" in caplog.text
    with pytest.raises(ValueError, match=r"int8 needs the native engine: .*torch\.float16"):
        make_engine(random_model().half(), kv_cache_dtype="int8")


def test_an_engine_stands_in_for_its_model_and_keeps_its_caches():
    model = random_model(n_kv_head=2)
    engine = Engine(model)
    assert engine.block_size == 9 and engine.config is model.config
    with pytest.raises(AttributeError):
        engine.nothing  # noqa: B018
    label, options = torch.tensor([2, 3]), {"sample_logits": False}
    expected = generate(model, label, 9, cfg_scale=2.0, **options)
    assert torch.equal(generate(engine, label, 9, cfg_scale=2.0, **options), expected)
    first = engine._cache
    assert torch.equal(generate(engine, label, 9, cfg_scale=2.0, **options), expected)
    assert torch.equal(generate(engine, label[:1], 4, **options), generate(model, label[:1], 4, **options))
    assert engine._cache is first
    generate(engine, torch.tensor([1, 2, 3]), 9, cfg_scale=2.0)
    assert engine._cache is not first


def test_the_older_compile_flag_asks_for_the_compiled_engine():
    flags = make_parser(None)
    add_model_args(flags)
    name = lambda *given: engine_name(flags.parse_args(given))  # noqa: E731
    assert [name(), name("--compile"), name("--engine", "eager")] == ["auto", "compiled", "eager"]
    with pytest.raises(ValueError, match="does not go with --engine native"):
        name("--compile", "--engine", "native")
