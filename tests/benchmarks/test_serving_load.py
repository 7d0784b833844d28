"""The load benchmark counts what came, and what did not."""

import asyncio

from autoregressive.serve.api import Limits
from autoregressive.serve.cards import read_card
from benchmarks.serving_load import load, numbers, random_card
from tests.autoregressive.serve.fake import FakeWorker, source_of
from tests.autoregressive.serve.http import serving
from tests.autoregressive.serve.tiny import tiny_cards


def test_what_clients_saw(tmp_path):
    with source_of(tiny_cards(tmp_path), FakeWorker(broken=(3,))) as source, serving(source, Limits()) as url:
        seen = asyncio.run(load(url, 3, 2, 2))
        assert dict(seen.outcomes) == {200: 5, 500: 1} and (seen.pictures, seen.lost) == (10, 0)
        assert len(seen.seconds) == 5 and seen.percentile(0.5) <= seen.percentile(0.99) <= seen.duration
        assert numbers(url)["llamagen_pictures_total"] in (10, 11)  # the other picture of the one that failed
        assert numbers(url)["process_resident_memory_bytes"] > 2**20


def test_a_random_model_has_a_card(tmp_path):
    card = read_card(random_card("tiny", tmp_path))
    assert (card.name, card.kind, card.edge, card.grid) == ("tiny", "c2i", 16, 4)
