"""How pictures and errors look on the wire, in the shape of the OpenAI images API."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from autoregressive.serve.cards import Card
from autoregressive.serve.parameters import Wanted
from autoregressive.serve.requests import Drawn, Event, Progress
from utils.image import png_bytes

_LONGEST_MESSAGE = 1000


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as clients of that API know it."""
    return {"error": {"message": message[:_LONGEST_MESSAGE], "type": kind, "param": param, "code": code}}


def tokens_of(wanted: Wanted) -> int:
    """Codes that are drawn for one picture."""
    edit = wanted.request.edit
    return wanted.card.grid**2 if edit is None else int(edit.mask.sum())


def encoded(wanted: Wanted, number: int, picture: np.ndarray) -> str:
    """Picture `number` as PNG with everything that is needed to draw it again, in base64."""
    return base64.b64encode(png_bytes(picture, wanted.request.facts(wanted.card, number))).decode()


def picture_entry(wanted: Wanted, number: int, picture: np.ndarray) -> dict[str, Any]:
    """An element of `data`. A URL holds the picture itself, so that nothing has to be kept or fetched."""
    content = encoded(wanted, number, picture)
    place = {"url": f"data:image/png;base64,{content}"} if wanted.as_url else {"b64_json": content}
    return place | {"seed": wanted.request.seed + number}


def pictures_body(wanted: Wanted, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer to a request without streaming."""
    return {
        "created": int(time.time()),
        "model": wanted.card.name,
        "seed": wanted.request.seed,
        "data": entries,
        **_form(wanted),
        "usage": _usage(tokens_of(wanted) * len(entries)),
    }


def _form(wanted: Wanted) -> dict[str, Any]:
    edge = wanted.card.edge
    return {"size": f"{edge}x{edge}", "output_format": "png", "background": "opaque"}


def _usage(tokens: int) -> dict[str, Any]:
    details = {"text_tokens": 0, "image_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": details, "output_tokens": tokens, "total_tokens": tokens}


class EventWriter:
    """Turns events of a request into server-sent ones; `index` in them is the number of the picture."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._kind = "image_generation" if wanted.request.edit is None else "image_edit"
        self._shown = [0] * wanted.request.n  # partial images of each picture

    async def write(self, events: AsyncIterator[Event]) -> AsyncIterator[tuple[Event, bytes]]:
        """Each event with what a stream sends for it, perhaps nothing."""
        async for event in events:
            yield event, await asyncio.to_thread(self._text, event) if self._wanted.stream else b""

    def _text(self, event: Event) -> bytes:
        return b"".join(self._drawn(event) if isinstance(event, Drawn) else self._progress(event))

    def _drawn(self, event: Drawn) -> list[bytes]:
        return [self._event("completed", event.number, self._picture(event.number, event.picture), usage=True)]

    def _progress(self, event: Progress) -> list[bytes]:
        parts, so_far = [], {"done": event.done, "total": event.total}
        if self._wanted.progress:
            parts.append(self._event("progress", event.number, so_far))
        shown = self._shown[event.number]
        due = event.total * (shown + 1) / (self._wanted.partial_images + 1)  # spread evenly over the picture
        if event.preview is not None and shown < self._wanted.partial_images and event.done >= due:
            self._shown[event.number] += 1
            content = self._picture(event.number, event.preview) | {"partial_image_index": shown} | so_far
            parts.append(self._event("partial_image", event.number, content))
        return parts

    def _picture(self, number: int, picture: np.ndarray) -> dict[str, Any]:
        content = {"b64_json": encoded(self._wanted, number, picture), "created_at": int(time.time())}
        return content | _form(self._wanted) | {"quality": "auto", "seed": self._wanted.request.seed + number}

    def _event(self, name: str, number: int, content: dict[str, Any], usage: bool = False) -> bytes:
        content = {"type": f"{self._kind}.{name}", "index": number, **content}
        if usage:
            content["usage"] = _usage(tokens_of(self._wanted))
        return server_sent(content)


def server_sent(content: dict[str, Any]) -> bytes:
    """One server-sent event, named by its type."""
    return f"event: {content.get('type', 'error')}\ndata: {json.dumps(content)}\n\n".encode()


def model_entry(card: Card, created: int) -> dict[str, Any]:
    """A model in the list of models, with everything that a page needs to offer it."""
    return {
        "id": card.name,
        "object": "model",
        "created": created,
        "owned_by": "llamagen",
        "kind": card.kind,
        "about": card.about,
        "size": f"{card.edge}x{card.edge}",
        "grid": card.grid,
        "num_classes": card.args.num_classes if card.kind == "c2i" else None,
        "classes": list(card.classes.names or ()) if card.classes else None,
        "examples": list(card.examples),
        "sampling": card.sampling,
    }
