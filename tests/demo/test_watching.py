"""Boards come as a request is drawn, and nothing is drawn for somebody who has gone."""

import asyncio
import time
from contextlib import aclosing

import numpy as np
import pytest

from autoregressive.serve.requests import Failed, Request, Sampling
from demo import watching
from demo.watching import Stop, boards
from tests.demo.fakes import FakeSource

PLAIN = Sampling(2.0, 0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(watching, "_SECONDS_BETWEEN_BOARDS", 0.001)


def test_the_last_board_has_all_pictures(cards):
    source, request = FakeSource(cards), Request("tiny-class", 2, PLAIN, seed=9, n=3)

    async def watch():
        return [(board.codes[0], board) async for board in boards(source, request, cards[0], Stop())]

    seen = asyncio.run(watch())
    counts, last = [count for count, _ in seen], seen[-1][1]
    assert counts == sorted(counts) and counts[0] == 0 and last.finished and source.closed == 0
    assert all(np.array_equal(tile.picture, source.picture(request, i)) for i, tile in enumerate(last.tiles))


def test_a_wish_to_stop_ends_the_drawing(cards):
    source, stop = FakeSource(cards, steps=10**6, wait=0.001), Stop()

    async def watch():
        async for board in boards(source, Request("tiny-class", 2, PLAIN), cards[0], stop):
            stop.asked = board.codes[0] >= 3
        return board

    board = asyncio.run(watch())
    assert source.closed == 1 and board.codes[0] >= 3 and not board.finished


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_who_goes_away_stops_the_drawing(cards, how):
    source, request = FakeSource(cards, steps=10**6, wait=0.001), Request("tiny-class", 2, PLAIN)

    async def watch(until):
        async with aclosing(boards(source, request, cards[0], Stop())) as shown:
            async for board in shown:
                if board.codes[0] >= until:
                    return

    async def leave():
        if how == "close":
            await watch(3)
            return
        task = asyncio.create_task(watch(10**9))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert source.closed == 1


def test_failures_reach_the_page(cards):
    async def watch():
        async for _ in boards(FakeSource(cards, fails=True), Request("tiny-class", 2, PLAIN), cards[0], Stop()):
            pass

    with pytest.raises(Failed, match="broke twice"):
        asyncio.run(watch())


def test_silence_gives_boards_too_so_that_closed_tabs_are_noticed(cards, monkeypatch):
    monkeypatch.setattr(watching, "_SECONDS_OF_SILENCE", 0.003)
    source = FakeSource(cards, steps=1, wait=0.2)

    async def watch():
        request = Request("tiny-class", 2, PLAIN)
        return [board.codes[0] async for board in boards(source, request, cards[0], Stop())]

    started = time.monotonic()
    seen = asyncio.run(watch())
    assert seen.count(0) > 3 and time.monotonic() - started < 60
