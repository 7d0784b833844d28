"""What is asked for and what comes back, for every way to draw: in this process, in workers, on vLLM, over HTTP."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from autoregressive.serve.cards import Card

LARGEST_SEED = 2**32 - 1
KEY_VARIABLE = "LLAMAGEN_API_KEY"  # of the environment: what a server asks its clients for


class BadRequest(ValueError):
    """A request that cannot be drawn; `param` is the part that is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Failed(RuntimeError):
    """A picture that could not be drawn though the request was right, such as when a worker died again and again."""


class Unavailable(Failed):
    """Nothing can be drawn just now, such as when too many wait or the server is stopping; later it may be."""


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn. Images of equal settings can be drawn in one batch."""

    cfg_scale: float
    top_k: int
    top_p: float
    temperature: float

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("cfg_scale", self.cfg_scale, 0, 100),
            ("top_p", self.top_p, 0, 1),
            ("temperature", self.temperature, 0, 10),
        ):
            if not math.isfinite(value) or not low <= value <= high:
                raise BadRequest(f"{name} is {low} to {high}, not {value}", name)
        if self.top_k < 0:
            raise BadRequest(f"top_k is 0 (all codes) or more, not {self.top_k}", "top_k")


@dataclass(frozen=True)
class Edit:
    """A picture of which some cells are drawn anew: uint8 (edge, edge, 3), and bool (grid * grid,), True = anew."""

    picture: np.ndarray
    mask: np.ndarray

    def check(self, card: Card) -> None:
        """BadRequest when it does not fit the model."""
        if self.picture.shape != (card.edge, card.edge, 3) or self.picture.dtype != np.uint8:
            raise BadRequest(f"the picture to edit must be {card.edge} x {card.edge} pixels", "image")
        if self.mask.shape != (card.grid**2,) or self.mask.dtype != bool:
            raise BadRequest(f"the mask must have {card.grid} x {card.grid} cells", "mask")
        if not self.mask.any():
            raise BadRequest("nothing is chosen: mark the part of the picture to draw anew", "mask")


@dataclass(frozen=True)
class Request:
    """`n` pictures of one subject, a class id or a text. Picture i is the one of ``seed + i``, whoever draws it."""

    model: str
    subject: int | str
    sampling: Sampling
    seed: int = 0
    n: int = 1
    edit: Edit | None = field(default=None, compare=False)
    previews: bool = False  # whether the parts that are drawn are wanted as pictures on the way

    def check(self, card: Card) -> None:
        """BadRequest unless `card`'s model can draw it."""
        if self.n < 1:
            raise BadRequest(f"n is at least 1, not {self.n}", "n")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise BadRequest(f"a seed is 0 to {LARGEST_SEED}, not {self.seed}", "seed")
        if card.kind == "t2i" and not isinstance(self.subject, str):
            raise BadRequest(f"{card.name} draws texts: give a prompt", "prompt")
        if card.classes is not None:
            if not isinstance(self.subject, int):
                raise BadRequest(f"{card.name} draws classes: give an id or a name", "prompt")
            if not 0 <= self.subject < card.classes.num_classes:
                raise BadRequest(f"classes are 0 to {card.classes.num_classes - 1}, not {self.subject}", "class")
        if self.edit is not None:
            self.edit.check(card)

    def facts(self, card: Card, number: int) -> dict[str, Any]:
        """What is noted in the file of picture `number`, as the samplers note it; enough to draw it again."""
        facts: dict[str, Any] = {"model": card.name, "seed": self.seed + number}
        if card.classes is None:
            facts["prompt"] = self.subject
        else:
            facts |= {"class_id": self.subject, "class_name": card.classes.name(int(self.subject))}
        if self.edit is not None:
            facts["cells"] = self.edit.mask.nonzero()[0].tolist()
        return facts | {"settings": vars(self.sampling)}


@dataclass(frozen=True)
class Progress:
    """Picture `number` of a request has `done` of `total` codes; `preview` shows them, uint8 (edge, edge, 3)."""

    number: int
    done: int
    total: int
    preview: np.ndarray | None = None


@dataclass(frozen=True)
class Drawn:
    """Picture `number` of a request, uint8 (edge, edge, 3)."""

    number: int
    picture: np.ndarray


Event = Progress | Drawn


class Source(Protocol):
    """Where pictures come from: models on this machine, or a server."""

    cards: Mapping[str, Card]
    where: str  # device and engine, or the server's address: for people

    def draw(self, request: Request) -> AsyncIterator[Event]:
        """Events of all pictures of a request, in the order in which things happen; ends after n `Drawn`.

        Closing the iterator gives the request up: what is not drawn yet will not be. Leaving an ``async for`` does not
        close it, ``contextlib.aclosing`` around it does; so does cancelling the task.

        Raises:
            BadRequest: it cannot be drawn, at once.
            Failed: it could not be drawn.
        """
        ...
