"""A request being drawn, as boards to show: a few a second, until all is drawn or nobody looks any more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from autoregressive.serve.cards import Card
from autoregressive.serve.requests import Event, Request, Source
from demo.board import Board

_SECONDS_BETWEEN_BOARDS = 0.12
_SECONDS_OF_SILENCE = 1.0  # then a board comes though nothing is new: writing to a closed tab shows that it is closed


@dataclass
class Stop:
    """Whether the person who watches has asked for an end."""

    asked: bool = False


async def boards(source: Source, request: Request, card: Card, stop: Stop) -> AsyncIterator[Board]:
    """The same board again and again, as it fills. Closing the iterator gives the request up, as does `stop`.

    Raises:
        BadRequest, Failed: as the source does.
    """
    board, news = Board(request, card), deque[Event]()
    drawing = asyncio.create_task(_collect(source, request, news))
    try:
        yield board
        silent = 0.0
        while True:
            await asyncio.wait({drawing}, timeout=_SECONDS_BETWEEN_BOARDS)
            ended = drawing.done()
            silent = 0.0 if news else silent + _SECONDS_BETWEEN_BOARDS
            while news:
                board.take(news.popleft())
            if ended:
                drawing.result()
                yield board
                return
            if stop.asked:
                return
            if silent == 0 or silent >= _SECONDS_OF_SILENCE:
                silent = 0.0
                yield board
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)


async def _collect(source: Source, request: Request, news: deque[Event]) -> None:
    async with aclosing(source.draw(request)) as events:
        async for event in events:
            news.append(event)
