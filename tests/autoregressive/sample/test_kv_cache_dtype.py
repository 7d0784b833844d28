"""--kv-cache-dtype reaches the engine and is a setting of image sets; its default changes none."""

import pytest
import torch

from autoregressive.sample import pipeline, sample_c2i_ddp
from autoregressive.sample.image_set import folder_name, sample_image_set, settings
from autoregressive.serve.cards import bundled_cards, card_parser, given_flags
from autoregressive.serve.vllm_source import why_not
from tests.autoregressive.sample.tiny import tiny_models

INT8 = ["--kv-cache-dtype", "int8"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return [*map(str, tiny_models(tmp_path_factory.mktemp("tiny"))), "--engine", "eager"]


def test_the_default_is_no_setting_and_another_format_has_a_folder_of_its_own(tiny):
    parser = sample_c2i_ddp.parser()
    plain, eight = parser.parse_args(tiny), parser.parse_args([*tiny, *INT8])
    assert plain.kv_cache_dtype == "auto" and "kv_cache_dtype" not in settings(plain)
    assert settings(eight) == {**settings(plain), "kv_cache_dtype": "int8"}
    defaults = vars(parser.parse_args([]))
    assert folder_name(eight, defaults) == f"{folder_name(plain, defaults)}-kv-cache-int8"


def test_an_engine_without_such_caches_refuses_them(tiny, tmp_path):
    parser = sample_c2i_ddp.parser()
    args = parser.parse_args([*tiny, *INT8, "--sample-dir", str(tmp_path)])
    with pytest.raises(ValueError, match="--kv-cache-dtype int8 needs a triton or native engine; eager keeps"):
        sample_image_set(args, vars(parser.parse_args([])))
    assert not list(tmp_path.iterdir())


def test_the_flag_reaches_the_engine_with_the_others(tiny, monkeypatch):
    monkeypatch.setattr(pipeline, "make_engine", lambda model, *chosen: chosen)
    args = sample_c2i_ddp.parser().parse_args([*tiny, *INT8, "--quantize", "int8"])
    chosen, _ = pipeline.load_models(args, torch.device("cpu"))
    assert chosen == ("eager", "int8", "int8")


def test_servers_take_it_for_any_model_but_vllm_does_not():
    assert given_flags(card_parser(), INT8) == {"kv_cache_dtype": "int8"}
    card = bundled_cards()[0]
    assert why_not(card) is None
    card.args.kv_cache_dtype = "int8"
    assert why_not(card) == "vLLM has no --kv-cache-dtype"
