"""A server draws the same as the models it has, and its errors are those of any source."""

import asyncio
import contextlib
import http.server
import threading

import numpy as np
import pytest

from autoregressive.serve import studio as studio_module
from autoregressive.serve.api import Limits
from autoregressive.serve.batching import local_source
from autoregressive.serve.client import server_source
from autoregressive.serve.requests import BadRequest, Drawn, Edit, Failed, Progress, Request, Sampling, Unavailable
from tests.autoregressive.serve.fake import FakeWorker, picture_of, source_of
from tests.autoregressive.serve.http import serving
from tests.autoregressive.serve.tiny import tiny_cards

PLAIN = Sampling(cfg_scale=3.0, top_k=20, top_p=1.0, temperature=0.8)
NOISE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
EDIT = Edit(NOISE, np.isin(np.arange(16), (2, 7, 11)))


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return tiny_cards(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="module")
def local(cards):
    source = local_source(cards, workers=0)
    yield source
    source.close()


@pytest.fixture(scope="module")
def server(local):
    with serving(local, Limits()) as address:
        yield server_source(address)


async def all_of(source, request):
    async with contextlib.aclosing(source.draw(request)) as events:
        return [event async for event in events]


def draw(source, request):
    return asyncio.run(all_of(source, request))


def pictures(source, request):
    found = {e.number: e.picture for e in draw(source, request) if isinstance(e, Drawn)}
    return np.stack([found[number] for number in range(request.n)])


def test_a_server_is_known_by_the_cards_of_its_models(server, cards):
    for card in cards:
        there = server.cards[card.name]
        assert (there.kind, there.edge, there.grid, there.about) == (card.kind, card.edge, card.grid, card.about)
        assert there.sampling == card.sampling and there.examples == card.examples
        assert (there.classes and list(there.classes.names)) == (card.classes and list(card.classes.names))
    assert server.cards["tiny-class"].classes.find("BLUE square") == 1
    assert server.where.startswith("http://127.0.0.1") and "cpu, eager" in server.where


@pytest.mark.parametrize(
    "request_",
    [
        Request("tiny-class", 2, PLAIN, seed=5, n=3),
        Request("tiny-text", "a red cat", PLAIN, seed=5, n=2),
        Request("tiny-class", 0, PLAIN, seed=5, n=2, edit=EDIT),
        Request("tiny-text", "the dog", PLAIN, seed=5, edit=EDIT, previews=True),
    ],
    ids=["class", "text", "edit", "edit of a text"],
)
def test_its_pictures_are_those_of_its_models(server, local, request_):
    assert np.array_equal(pictures(server, request_), pictures(local, request_))


def test_progress_and_previews_come_along(server, monkeypatch):
    monkeypatch.setattr(studio_module, "_SECONDS_BETWEEN_REPORTS", 0.001)
    events = draw(server, Request("tiny-class", 1, PLAIN, seed=1, previews=True))
    told = [event for event in events if isinstance(event, Progress)]
    assert told and all(event.total == 16 for event in told) and isinstance(events[-1], Drawn)
    assert any(event.preview is not None and event.preview.shape == (16, 16, 3) for event in told)
    assert [event.done for event in told] == sorted(event.done for event in told)


def test_what_cannot_be_drawn_is_refused_before_it_is_sent(server):
    for wrong, param in ((Request("other", 1, PLAIN), "model"), (Request("tiny-class", 9, PLAIN), "class")):
        with pytest.raises(BadRequest) as refused:
            server.draw(wrong)
        assert refused.value.param == param


def test_errors_of_the_server_are_those_of_a_source(cards):
    worker = FakeWorker(broken=(66,))
    with source_of(cards, worker) as source, serving(source, Limits(max_n=4, max_queue=2, timeout=2)) as address:
        far = server_source(address)
        with pytest.raises(BadRequest, match="n is 1 to 4") as refused:
            draw(far, Request("tiny-class", 1, PLAIN, n=5))
        assert refused.value.param == "n"
        with pytest.raises(Unavailable, match="are waiting already"):
            draw(far, Request("tiny-class", 1, PLAIN, n=3))
        with pytest.raises(Failed, match="went wrong twice"):
            draw(far, Request("tiny-class", 1, PLAIN, seed=66))
        worker.gate.clear()
        with pytest.raises(Failed, match="not ready within"):
            draw(far, Request("tiny-class", 1, PLAIN))
        worker.gate.set()
        assert (pictures(far, Request("tiny-class", 1, PLAIN, seed=4))[0] == picture_of(4)).all()
    with pytest.raises(Unavailable, match="does not answer"):
        draw(far, Request("tiny-class", 1, PLAIN))


def test_giving_a_request_up_reaches_the_server(cards):
    async def first_event(source):
        async with contextlib.aclosing(source.draw(Request("tiny-class", 1, PLAIN, n=2))) as events:
            return await anext(events)

    worker = FakeWorker()
    worker.gate.clear()
    with source_of(cards, worker) as source, serving(source, Limits()) as address:
        assert isinstance(asyncio.run(first_event(server_source(address))), Progress)
        for _ in range(1000):
            if worker.batches == ["stopped"]:
                break
            threading.Event().wait(0.01)
        assert worker.batches == ["stopped"]


def test_a_key(cards):
    with source_of(cards, FakeWorker()) as source, serving(source, Limits(), key="sésame") as address:
        assert len(pictures(server_source(address, "sésame"), Request("tiny-class", 1, PLAIN))) == 1
        for wrong in (None, "other"):
            with pytest.raises(ValueError, match="asks for an API key"):
                server_source(address, wrong)


def test_other_servers_and_none():
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "x"}]}' if self.path == "/v1/models" else b"{}")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="no server of this project"):
            server_source(f"http://127.0.0.1:{other.server_port}/v1/")
        other.shutdown()
    for url in ("http://127.0.0.1:9", "nonsense", "http://"):
        with pytest.raises(ValueError, match="no server answers"):
            server_source(url)
