"""Pictures drawn by a server of this project (`autoregressive.serve.server`) somewhere else, as a `Source`."""

from __future__ import annotations

import base64
import io
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import numpy as np
from PIL import Image

from autoregressive.serve.cards import Card, card_parser
from autoregressive.serve.parameters import MOST_PARTIAL_IMAGES
from autoregressive.serve.requests import (
    KEY_VARIABLE,
    BadRequest,
    Drawn,
    Edit,
    Event,
    Failed,
    Progress,
    Request,
    Unavailable,
)
from dataset.imagenet_names import imagenet_names
from utils.image import png_bytes

_TIMEOUT = httpx.Timeout(20, read=600)  # the server has a limit of its own for pictures
_UNDERSTOOD = (ValueError, KeyError, TypeError, AttributeError)  # what an answer of another form leads to


class ServerSource:
    """The models of a server. May be used from several event loops; it holds nothing open."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Ask a server, such as ``http://127.0.0.1:8000``, what it draws.

        Raises:
            ValueError: nobody answers there, or with something else, or it asks for another key.
        """
        self._base = url.rstrip("/").removesuffix("/v1")
        self._options: dict[str, Any] = {"timeout": _TIMEOUT, "verify": ssl.create_default_context()}
        if key:
            self._options["headers"] = {"Authorization": b"Bearer " + key.encode()}
        try:
            with httpx.Client(base_url=self._base, **self._options) as client:
                health, answer = client.get("/health").json(), client.get("/v1/models")
            if answer.status_code == 401:
                raise ValueError(f"{self._base} asks for an API key: set {KEY_VARIABLE} to that of the server")
            self.cards: Mapping[str, Card] = {entry["id"]: _card(entry) for entry in answer.json()["data"]}
            self.where = f"{self._base} ({health['where']})"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"no server answers at {self._base}: {error}") from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SystemExit) as error:
            raise ValueError(f"{self._base} answers, but is no server of this project") from error

    def draw(self, request: Request) -> AsyncIterator[Event]:
        """See `Source`."""
        if request.model not in self.cards:
            raise BadRequest(f"there is no model {request.model}; there are: {', '.join(self.cards)}", "model")
        card = self.cards[request.model]
        request.check(card)
        return self._events(request, card)

    async def _events(self, request: Request, card: Card) -> AsyncIterator[Event]:
        kind, what = ("generations", _json(request)) if request.edit is None else ("edits", _form(request, card))
        left = request.n
        try:
            async with (
                httpx.AsyncClient(base_url=self._base, **self._options) as client,
                client.stream("POST", f"/v1/images/{kind}", **what) as answer,
            ):
                if answer.status_code != 200:
                    raise _error(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    event = _event(line, card)
                    if event is not None:
                        left -= isinstance(event, Drawn)
                        yield event
                    if not left:
                        return
        except httpx.HTTPError as error:
            raise Unavailable(f"the server {self._base} does not answer ({type(error).__name__})") from error
        raise Failed(f"the server {self._base} ended its answer before all pictures were there")

    def close(self) -> None:
        """Nothing is open."""


def server_source(url: str, key: str | None = None) -> ServerSource:
    """The models of the server at `url` as a `Source`; the counterpart of `batching.local_source`.

    `key` is what the server asks for; by default it is in the environment (`KEY_VARIABLE`).

    Raises:
        ValueError: nobody answers there, or with something else, or it asks for another key.
    """
    return ServerSource(url, key or os.environ.get(KEY_VARIABLE))


def _card(entry: Mapping[str, Any]) -> Card:
    """A card from its entry in the list of models."""
    edge, grid, names = int(entry["size"].split("x")[0]), int(entry["grid"]), entry["classes"]
    flags = {"image-size": edge, "downsample-size": edge // grid, "gpt-type": entry["kind"]}
    if names is not None:
        flags["num-classes"] = entry["num_classes"]
    for name, value in entry["sampling"].items():
        flags[name.replace("_", "-")] = value
    args = card_parser(entry["kind"]).parse_args([f"--{flag}={value}" for flag, value in flags.items()])
    own = None if not names or names == list(imagenet_names()) else tuple(map(str, names))
    return Card(str(entry["id"]), args, str(entry["about"]), tuple(map(str, entry["examples"])), own)


def _fields(request: Request) -> dict[str, Any]:
    subject = "class" if isinstance(request.subject, int) else "prompt"
    return {
        "model": request.model,
        subject: request.subject,
        "n": request.n,
        "seed": request.seed,
        **vars(request.sampling),
        "stream": True,
        "progress": True,
        "partial_images": MOST_PARTIAL_IMAGES if request.previews else 0,
    }


def _json(request: Request) -> dict[str, Any]:
    return {"json": _fields(request)}


def _form(request: Request, card: Card) -> dict[str, Any]:
    edit = request.edit
    assert edit is not None
    fields = {name: str(value) for name, value in _fields(request).items()}
    return {"data": fields, "files": {"image": png_bytes(edit.picture), "mask": _mask_png(edit, card)}}


def _mask_png(edit: Edit, card: Card) -> bytes:
    """A picture that is transparent where the edit draws."""
    stride = card.edge // card.grid
    cells = np.where(edit.mask, 0, 255).astype(np.uint8).reshape(card.grid, card.grid)
    alpha = Image.fromarray(cells.repeat(stride, 0).repeat(stride, 1))
    content = io.BytesIO()
    Image.merge("LA", (alpha, alpha)).save(content, format="PNG")
    return content.getvalue()


def _error(status: int, body: bytes) -> Exception:
    """The error that an answer stands for."""
    try:
        error = json.loads(body)["error"]
        message, param = str(error["message"]), error["param"]
    except _UNDERSTOOD:
        message, param = f"the server answered {status}", None
    if status in (429, 503):
        return Unavailable(message)
    if status in (400, 404, 413):
        return BadRequest(message, param)
    return Failed(message)


def _event(line: str, card: Card) -> Event | None:
    """What a line of a stream tells, if anything.

    Raises:
        Failed: it tells of an error, or nothing that can be understood.
    """
    if not line.startswith("data:"):
        return None
    try:
        content = json.loads(line.removeprefix("data:"))
        if "error" in content:
            message, code = str(content["error"]["message"]), content["error"]["code"]
            raise Unavailable(message) if code == "unavailable" else Failed(message)
        number, kind = int(content["index"]), content["type"].split(".")[-1]
        if kind == "completed":
            return Drawn(number, _picture(content["b64_json"], card))
        if kind == "partial_image":
            return Progress(number, content["done"], content["total"], _picture(content["b64_json"], card))
        return Progress(number, content["done"], content["total"]) if kind == "progress" else None
    except _UNDERSTOOD as error:
        raise Failed("the server's answer cannot be understood; is it of another version?") from error


def _picture(content: str, card: Card) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(content)), formats=("PNG",)) as image:
        if image.size != (card.edge, card.edge):
            raise ValueError("a picture of another size")
        return np.array(image.convert("RGB"))
