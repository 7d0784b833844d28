"""A source without models: pictures of one colour, made of subject and seed, cell by cell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np

from autoregressive.serve.requests import Drawn, Event, Failed, Progress, Request


class FakeSource:
    """Draws pictures one after the other, `steps` reports each; `closed` counts requests that were given up."""

    where = "nothing"

    def __init__(self, cards, steps: int = 4, wait: float = 0.0, fails: bool = False) -> None:
        self.cards = {card.name: card for card in cards}
        self.steps, self.wait, self.fails = steps, wait, fails
        self.closed = 0

    def picture(self, request: Request, number: int) -> np.ndarray:
        """What it draws as picture `number`."""
        edge = self.cards[request.model].edge
        subject = len(str(request.subject)) if isinstance(request.subject, str) else request.subject
        return np.full((edge, edge, 3), (subject, (request.seed + number) % 256, 7), np.uint8)

    async def draw(self, request: Request) -> AsyncIterator[Event]:
        """Reports and pictures."""
        ended = False
        try:
            for number in range(request.n):
                for step in range(self.steps):
                    await asyncio.sleep(self.wait)
                    yield Progress(number, step + 1, self.steps, self.picture(request, number) // 2)
                if self.fails:
                    raise Failed("it broke twice")
                yield Drawn(number, self.picture(request, number))
            ended = True
        finally:
            self.closed += not ended
