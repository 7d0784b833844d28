"""vLLM as a source: with a stand-in for its process everywhere, with itself where it is installed."""

import asyncio
import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoregressive.sample.pipeline import load_models
from autoregressive.serve import vllm_source as module
from autoregressive.serve.cards import card_of_args, card_parser, with_values
from autoregressive.serve.requests import BadRequest, Drawn, Edit, Failed, Progress, Request, Sampling
from autoregressive.serve.server import backend_of, server_parser
from autoregressive.serve.studio import Job, Studio
from autoregressive.serve.vllm_source import vllm_python, vllm_source, why_not
from autoregressive.serve.workers import GivenUp
from tests.autoregressive.serve.tiny import tiny_cards
from tokenizer.coding import ImageDecoder, decode_codes
from utils.image import to_uint8

PLAIN = Sampling(cfg_scale=3.0, top_k=20, top_p=1.0, temperature=0.8)
GREY = int(127.5 * 0.85 + 128)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return tiny_cards(tmp_path_factory.mktemp("cards"))


@pytest.fixture
def stand_in(monkeypatch):
    """In place of vLLM's process."""
    monkeypatch.setattr(module, "_COMMAND", Path(__file__).with_name("vllm_stand_in.py"))
    monkeypatch.setattr(module, "find_spec", lambda name: name)


@pytest.fixture
def source(cards, stand_in):
    with contextlib.closing(vllm_source(cards[0], max_batch_size=4)) as source:
        yield source


def ask(seed, n=1, subject=1, model="tiny-class", **options):
    return Request(model, subject, PLAIN, seed, n, **options)


async def all_of(source, request):
    return [event async for event in source.draw(request)]


def draw(source, request):
    return asyncio.run(all_of(source, request))


def pictures(events):
    found = {event.number: event.picture for event in events if isinstance(event, Drawn)}
    return np.stack([found[number] for number in range(len(found))])


def expected(card, *seeds):
    """The pictures of the stand-in's codes."""
    _, tokenizer = load_models(card.args, torch.device("cpu"), card.kind)
    codes = torch.tensor([[(seed + i) % 64 for i in range(16)] for seed in seeds])
    return to_uint8(decode_codes(tokenizer, codes)).numpy()


def test_pictures_are_decoded_in_the_cards_format(cards, stand_in):
    card = with_values(cards[0], {"decode_precision": "bf16"})
    _, tokenizer = load_models(card.args, torch.device("cpu"))
    codes = torch.tensor([[(5 + i) % 64 for i in range(16)]])
    with contextlib.closing(vllm_source(card, max_batch_size=4)) as source:
        found = pictures(draw(source, ask(5)))
    assert np.array_equal(found, to_uint8(ImageDecoder(tokenizer, "bf16")(codes)).numpy())
    assert not np.array_equal(found, expected(card, 5))


def test_codes_become_pictures_and_parts_of_pictures(cards, source):
    assert np.array_equal(pictures(draw(source, ask(5, 6))), expected(cards[0], *range(5, 11)))

    async def parts():
        async with contextlib.aclosing(source.draw(ask(1000, previews=True))) as events:
            async for event in events:
                if event.done == 8 or event.preview is not None:
                    return event
        raise AssertionError

    part = asyncio.run(parts())
    assert isinstance(part, Progress) and part.total == 16 and (part.preview[-1] == GREY).all()
    assert source.where == "cpu, vLLM" and source.workers == (1, 1)


def test_texts_become_features(cards, stand_in):
    with contextlib.closing(vllm_source(cards[1], max_batch_size=2)) as source:
        found = pictures(draw(source, ask(5, 2, "a red cat", "tiny-text")))
        assert np.array_equal(found, expected(cards[1], 5, 6))


def test_a_request_that_is_given_up_is_stopped_in_vllm(cards, source):
    async def leave():
        async with contextlib.aclosing(source.draw(ask(1000))) as events:
            await anext(events)

    asyncio.run(leave())
    note = Path(source._engine._order[0]) / "stopped"
    for _ in range(500):
        if note.exists():
            break
        asyncio.run(asyncio.sleep(0.01))
    assert note.read_text() and len(draw(source, ask(1))) >= 1
    note.unlink()


def test_a_picture_that_kills_the_process_twice_fails_alone(cards, source):
    async def several():
        return await asyncio.gather(
            all_of(source, ask(200, 2)), all_of(source, ask(66)), all_of(source, ask(210, 5)), return_exceptions=True
        )

    first, fatal, second = asyncio.run(several())
    assert isinstance(fatal, Failed)
    assert np.array_equal(pictures(first), expected(cards[0], 200, 201))
    assert np.array_equal(pictures(second), expected(cards[0], *range(210, 215)))
    assert draw(source, ask(1))
    assert source.restarts == 2 and source.workers == (1, 1)


@pytest.mark.parametrize("again", [True, False])
def test_a_picture_that_is_drawn_again_is_alone_and_who_waits_for_it_may_give_up(again):
    turns, order = module._Turns(), []

    def draw(again, given_up=False):
        with turns.turn(SimpleNamespace(again=again, given_up=given_up)):
            order.append(again)

    with ThreadPoolExecutor() as pool:
        with turns.turn(SimpleNamespace(again=not again, given_up=False)):
            with pytest.raises(GivenUp):
                draw(again, given_up=True)
            waiting = [pool.submit(draw, again), pool.submit(draw, again)]
            time.sleep(0.2)
            assert order == []
        for one in waiting:
            one.result()
    assert order == [again, again]


def test_what_vllm_refuses_fails_alone(source):
    with pytest.raises(Failed):
        draw(source, ask(1, subject=2))
    assert draw(source, ask(1)) and source.restarts == 0


def test_there_are_no_edits(source):
    with pytest.raises(BadRequest, match="cannot be edited on vLLM"):
        source.draw(ask(1, edit=Edit(np.zeros((16, 16, 3), np.uint8), np.arange(16) > 8)))


def test_a_model_that_vllm_refuses(cards, stand_in, monkeypatch):
    monkeypatch.setenv("STAND_IN", "refuse")
    with pytest.raises(ValueError, match="does not fit"):
        vllm_source(cards[0])


def test_flags_that_vllm_cannot_do(cards):
    assert why_not(cards[0]) is None and why_not(cards[1]) is None
    args = card_parser().parse_args(["--gpt-ckpt", "x", "--cfg-schedule", "linear"])
    assert why_not(card_of_args(args)) == "vLLM has no --cfg-schedule"


def test_which_backend_is_chosen(cards, monkeypatch):
    chosen = []
    monkeypatch.setattr("autoregressive.serve.server.vllm_source", lambda *_, **__: chosen.append("vllm"))
    monkeypatch.setattr("autoregressive.serve.server.local_source", lambda *_, **__: chosen.append("local"))

    def choose(count, *flags):
        backend_of(server_parser().parse_args(flags), cards[:count])

    for installed in ("python", None):
        monkeypatch.setattr("autoregressive.serve.server.vllm_python", lambda installed=installed: installed)
        choose(1), choose(2), choose(1, "--workers", "1"), choose(1, "--backend", "local")
    assert chosen == ["vllm", "local", "local", "local", "local", "local", "local", "local"]
    with pytest.raises(ValueError, match="one model at a time"):
        choose(2, "--backend", "vllm")


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason="no vLLM: bash scripts/setup_vllm.sh")
def test_vllm_draws_what_a_studio_draws(cards, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    with contextlib.closing(vllm_source(cards[0], max_batch_size=4)) as source:
        found = pictures(draw(source, ask(5, 6)))
    studio = Studio(cards[:1], torch.device("cpu"))
    assert np.array_equal(found, studio.draw([Job("tiny-class", 1, PLAIN, seed) for seed in range(5, 11)]))
