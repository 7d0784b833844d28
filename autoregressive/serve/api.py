"""The image API as an ASGI application: paths, limits, errors. What it takes and gives is in docs/serving.md."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoregressive.serve.metrics import Backend, Meter
from autoregressive.serve.parameters import (
    UnknownModel,
    Wanted,
    edit_of,
    fields_of_form,
    fields_of_json,
    model_of,
    wanted_of,
)
from autoregressive.serve.replies import (
    EventWriter,
    error_body,
    model_entry,
    picture_entry,
    pictures_body,
    tokens_of,
)
from autoregressive.serve.requests import BadRequest, Drawn, Event, Failed, Unavailable

_OPEN_PATHS = ("/health",)  # no key needed
_CLOSED = 499  # the client went away; nginx' number, for the log alone
_SLACK = 10.0  # seconds for the last bytes of an answer

_log = logging.getLogger("llamagen")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What a server puts up with."""

    max_n: int = 10  # pictures of a request
    max_queue: int = 256  # pictures asked for and not drawn yet, of all requests
    timeout: float = 300.0  # seconds from a request to its last picture
    body_timeout: float = 30.0  # seconds for a request's body
    max_body: int = 20 * 2**20  # bytes


class _Refused(Exception):
    """An error that becomes an answer."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.headers = status, kind, code, headers


def _pictures_late(limit: float) -> _Refused:
    return _Refused(504, f"the pictures were not ready within {limit:g} seconds", "server_error", "timeout")


def _body_late(limit: float) -> _Refused:
    message = f"the body was not here within {limit:g} seconds"
    return _Refused(408, message, "invalid_request_error", Connection="close")


def _answer_to(error: Exception) -> Response:
    """Any exception as an answer; those that are nobody's fault but ours say nothing of what is inside."""
    if isinstance(error, _Refused):
        return JSONResponse(error_body(str(error), error.kind, None, error.code), error.status, error.headers)
    if isinstance(error, BadRequest):
        status, code = (404, "model_not_found") if isinstance(error, UnknownModel) else (400, "invalid_value")
        return JSONResponse(error_body(str(error), "invalid_request_error", error.param, code), status)
    if isinstance(error, Unavailable):
        return JSONResponse(error_body(str(error), "server_error", None, "unavailable"), 503, {"Retry-After": "5"})
    if isinstance(error, Failed):
        return JSONResponse(error_body(str(error), "server_error", None, "failed"), 500)
    if isinstance(error, HTTPException):
        message = {404: "there is no such path", 405: "this path takes another method"}.get(error.status_code)
        body = error_body(message or error.detail, "invalid_request_error")
        return JSONResponse(body, error.status_code, error.headers)
    _log.error("an error in the server", exc_info=error)
    return JSONResponse(error_body("an error in the server; its log says more", "server_error"), 500)


class Api:
    """The handlers, and what they share."""

    def __init__(self, backend: Backend, limits: Limits, key: str | None = None) -> None:
        self.backend, self.limits = backend, limits
        self.meter = Meter(backend)
        self.stopping = False
        self.outstanding = 0
        self._seconds_a_picture = 1.0  # a running mean of how often one becomes ready while there is work
        self._started = int(time.time())
        routes = [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        self.app: ASGIApp = _Front(Router(routes, redirect_slashes=False), self.meter, limits, key)

    async def generations(self, http: Request) -> Response:
        """POST /v1/images/generations."""
        if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "send JSON, with Content-Type: application/json", "invalid_request_error")
        body = await self._body(http.body())
        return self._answer(http, wanted_of(fields_of_json(body), self.backend.cards, self.limits.max_n))

    async def edits(self, http: Request) -> Response:
        """POST /v1/images/edits."""
        if http.headers.get("content-type", "").split(";")[0].strip().lower() != "multipart/form-data":
            raise _Refused(415, "send a form, with Content-Type: multipart/form-data", "invalid_request_error")
        texts: dict[str, str] = {}
        files: dict[str, bytes] = {}
        form = await self._body(http.form(max_files=2, max_fields=40, max_part_size=2**16))
        async with contextlib.aclosing(_Closing(form)):
            for name, value in form.multi_items():
                name = name.removesuffix("[]")
                if name in texts or name in files:
                    raise BadRequest(f"{name} is given twice", name)
                if isinstance(value, UploadFile):
                    files[name] = await value.read()
                else:
                    texts[name] = value
        if set(files) - {"image", "mask"} or "image" not in files:
            raise BadRequest("an edit takes a file named image, and perhaps one named mask", "image")
        fields = fields_of_form(texts)
        card = model_of(fields, self.backend.cards)
        edit = await asyncio.to_thread(edit_of, files["image"], files.get("mask"), card)
        return self._answer(http, wanted_of(fields, self.backend.cards, self.limits.max_n, edit))

    async def _body(self, reading: Awaitable[Result]) -> Result:
        return await _within(self.limits.body_timeout, reading, _body_late, self.limits.body_timeout)

    def _answer(self, http: Request, wanted: Wanted) -> Response:
        request = wanted.request
        http.scope["note"] |= {"model": request.model, "n": request.n, "seed": request.seed}
        if self.stopping:
            raise Unavailable("the server is stopping")
        if self.outstanding + request.n > self.limits.max_queue:
            wait = min(max(math.ceil(self.outstanding * self._seconds_a_picture), 1), 60)
            message = f"{self.outstanding} pictures are waiting already, try again later"
            raise _Refused(429, message, "rate_limit_error", "queue_full", **{"Retry-After": str(wait)})
        events = self.backend.draw(request)  # says at once what cannot be drawn
        self.outstanding += request.n
        return (_Stream if wanted.stream else _Whole)(self, wanted, events)

    async def follow(self, answer: _Answer) -> AsyncIterator[tuple[Event, bytes]]:
        """The events of an answer with what a stream sends for them, counted and in time."""
        started, wanted = time.monotonic(), answer.wanted
        model, end = wanted.request.model, started + self.limits.timeout
        written = EventWriter(wanted).write(answer.events)
        async with contextlib.aclosing(answer.events), contextlib.aclosing(written):
            while answer.left:
                left = end - time.monotonic()
                event, text = await _within(left, anext(written), _pictures_late, self.limits.timeout)
                if isinstance(event, Drawn):
                    answer.left -= 1
                    self.outstanding -= 1
                    self.meter.pictures.labels(model).inc()
                    self.meter.tokens.labels(model).inc(tokens_of(wanted))
                    self.meter.picture_seconds.labels(model).observe(time.monotonic() - started)
                yield event, text
        pace = (time.monotonic() - started) / wanted.request.n
        self._seconds_a_picture += 0.1 * (pace - self._seconds_a_picture)

    async def models(self, http: Request) -> Response:
        """GET /v1/models."""
        entries = [model_entry(card, self._started) for card in self.backend.cards.values()]
        return JSONResponse({"object": "list", "data": entries})

    async def model(self, http: Request) -> Response:
        """GET /v1/models/{name}."""
        card = model_of({"model": http.path_params["name"]}, self.backend.cards)
        return JSONResponse(model_entry(card, self._started))

    async def health(self, http: Request) -> Response:
        """GET /health: 200 while it can draw, 503 when it stops or no worker is ready."""
        ready, count = self.backend.workers
        status = "stopping" if self.stopping else "ready" if ready else "no worker is ready"
        content = {
            "status": status,
            "workers": {"ready": ready, "all": count, "restarts": self.backend.restarts},
            "pictures": {"waiting": self.backend.waiting, "outstanding": self.outstanding},
            "models": list(self.backend.cards),
            "where": self.backend.where,
        }
        return JSONResponse(content, 200 if status == "ready" else 503)

    async def metrics(self, http: Request) -> Response:
        """GET /metrics."""
        return Response(self.meter.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Closing:
    def __init__(self, form: Any) -> None:
        self.aclose = form.close


async def _within(seconds: float, work: Awaitable[Result], late: Callable[[float], Exception], limit: float) -> Result:
    """What `work` gives, or the exception that `late` makes of the limit.

    Not ``asyncio.wait_for``, which before Python 3.12 loses a cancellation that comes together with the result.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=max(seconds, 0))
        if task.done():
            return task.result()
    finally:
        await _cancelled(task)
    raise late(limit)


class _Answer(Response):
    """An answer that is still being drawn; it is given up when the client goes away."""

    def __init__(self, api: Api, wanted: Wanted, events: AsyncIterator[Event]) -> None:
        self.api, self.wanted, self.events = api, wanted, events
        self.left = wanted.request.n  # pictures that are not drawn
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self.work(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            limit = self.api.limits.timeout + _SLACK  # also for a client that reads nothing
            await asyncio.wait({work, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                scope["note"]["outcome"] = "client gone" if gone.done() else "client too slow"
        finally:
            await _cancelled(work)
            await _cancelled(gone)
            self.api.outstanding -= self.left

    async def work(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


class _Whole(_Answer):
    """All pictures in one JSON object."""

    async def work(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted, entries = self.wanted, {}
        async with contextlib.aclosing(self.api.follow(self)) as events:
            async for event, _ in events:
                if isinstance(event, Drawn):
                    entries[event.number] = await asyncio.to_thread(picture_entry, wanted, event.number, event.picture)
        body = pictures_body(wanted, [entries[number] for number in range(wanted.request.n)])
        await JSONResponse(body)(scope, receive, send)


class _Stream(_Answer):
    """Server-sent events as things happen."""

    async def work(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx passes events on at once
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with contextlib.aclosing(self.api.follow(self)) as events:
                async for _, text in events:
                    if text:
                        await send({"type": "http.response.body", "body": text, "more_body": True})
        except Exception as error:
            answer = _answer_to(error)
            scope["note"]["outcome"] = str(answer.status_code)
            text = b"event: error\ndata: " + bytes(answer.body) + b"\n\n"
            await send({"type": "http.response.body", "body": text, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class _Front:
    """What every request passes: the key, the limit of its body, errors, one line in the log, metrics."""

    def __init__(self, app: ASGIApp, meter: Meter, limits: Limits, key: str | None) -> None:
        self._app, self._meter, self._limits = app, meter, limits
        self._key = key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, note, status = time.monotonic(), scope.setdefault("note", {}), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope)
            scope["app"] = self  # the router then raises what it refuses
            await self._app(scope, self._counted(scope, receive), sending)
        except ClientDisconnect:
            note["outcome"] = "client gone"
        except Exception as error:
            if status:
                raise
            await _answer_to(error)(scope, receive, sending)
        finally:
            self._record(scope, str(note.pop("outcome", status or _CLOSED)), time.monotonic() - started)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in _OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._key):
            message = "give the API key of this server: Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise _Refused(401, message, "invalid_request_error", "invalid_api_key", **headers)

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that refuses a body that is too large, as soon as it is known to be."""
        limit = self._limits.max_body
        length = dict(scope["headers"]).get(b"content-length", b"0")
        seen = 0

        def check(size: int) -> None:
            if size > limit:
                headers = {"Connection": "close"}  # the rest of it is not read
                raise _Refused(
                    413, f"the body is larger than {limit} bytes", "invalid_request_error", "too_large", **headers
                )

        check(int(length) if length.isdigit() else 0)

        async def receiving() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            check(seen)
            return message

        return receiving

    def _record(self, scope: Scope, outcome: str, seconds: float) -> None:
        endpoint = getattr(scope.get("endpoint"), "__name__", "other")
        self._meter.requests.labels(endpoint, outcome).inc()
        self._meter.seconds.labels(endpoint).observe(seconds)
        client = scope["client"][0] if scope.get("client") else "-"
        facts = "".join(f" {name}={value}" for name, value in scope["note"].items())
        _log.info("%s %s %.100r %s %.3f s%s", client, scope["method"], scope["path"], outcome, seconds, facts)
