"""A server in a thread of the test, and raw connections to it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

from autoregressive.serve.server import listen, make_server

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@contextlib.contextmanager
def serving(source, limits, key=None, grace=0):
    """Serve a source; gives the address."""
    listener = listen("127.0.0.1", 0)
    server = make_server(source, limits, key, grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def connect(address):
    """A TCP connection to an address such as http://127.0.0.1:8000."""
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def post(path, body, *headers):
    """The bytes of a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def generation(**fields):
    """The bytes of a request for pictures."""
    return post(GENERATIONS, json.dumps(fields).encode())


def events_of(text):
    """Server-sent events as (name, content)."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
