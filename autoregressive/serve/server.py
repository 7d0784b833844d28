"""Serve pictures over HTTP, in the shape of the OpenAI images API.

    python3 autoregressive/serve/server.py
    python3 autoregressive/serve/server.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt \
        --image-size 384

The first line serves the small emoji models that come with the project, the second a model of yours; --card serves
several. docs/serving.md says what can be asked for. With LLAMAGEN_API_KEY in the environment, clients must send that
key. SIGTERM and Ctrl-C let the pictures that have been begun become ready, up to --grace seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import uvicorn

from autoregressive.serve.api import Api, Limits
from autoregressive.serve.batching import local_source
from autoregressive.serve.cards import Card, add_card_args, card_parser, cards_of, given_flags
from autoregressive.serve.metrics import Backend
from autoregressive.serve.requests import KEY_VARIABLE
from autoregressive.serve.slow_clients import ImpatientProtocol
from autoregressive.serve.vllm_source import vllm_python, vllm_source, why_not
from utils.args import make_parser
from utils.errors import run
from utils.logger import create_logger

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MEBIBYTE = 2**20


def server_parser() -> argparse.ArgumentParser:
    """The flags of the server itself."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_server_args(flags)
    return flags


def parser(gpt_type: str = "c2i") -> argparse.ArgumentParser:
    """All flags, for people to read; with --gpt-type t2i those of models of texts."""
    flags = make_parser(__doc__)
    add_server_args(flags)
    add_card_args(flags, gpt_type)
    return flags


def add_server_args(flags: argparse.ArgumentParser) -> None:
    """Where it listens, how it draws, and what it puts up with."""
    limits = Limits()
    group = flags.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is reached from elsewhere")
    group.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any that is free")
    group.add_argument("--card", action="append", default=[], help="JSON file of a model to serve; repeatable")
    group.add_argument(
        "--workers", type=int, help="worker processes, 0: a thread of the server; the default is one per GPU, or one"
    )
    group.add_argument(
        "--backend",
        choices=["auto", "local", "vllm"],
        default="auto",
        help="auto: vLLM where it is installed (scripts/setup_vllm.sh), there is one model and no --workers; "
        "on a CPU local is faster (docs/serving.md)",
    )
    group.add_argument("--max-batch-size", type=int, default=16, help="pictures that are drawn together")
    group = flags.add_argument_group("limits")
    group.add_argument("--max-n", type=int, default=limits.max_n, help="pictures of one request")
    group.add_argument(
        "--max-queue", type=int, default=limits.max_queue, help="pictures asked for and not drawn yet; more get 429"
    )
    group.add_argument(
        "--timeout", type=float, default=limits.timeout, help="seconds until a request's last picture, else 504"
    )
    group.add_argument("--body-timeout", type=float, default=limits.body_timeout, help="seconds for a body, else 408")
    group.add_argument("--max-body", type=float, default=limits.max_body / _MEBIBYTE, help="MiB of a body, else 413")
    group.add_argument("--grace", type=float, default=30.0, help="seconds for pictures that are begun, at the end")


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits that the flags set.

    Raises:
        ValueError: one that nothing can fulfil.
    """
    for name in ("max_n", "max_queue", "timeout", "body_timeout", "max_body"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(args, name)}")
    return Limits(args.max_n, args.max_queue, args.timeout, args.body_timeout, int(args.max_body * _MEBIBYTE))


class _Server(uvicorn.Server):
    """Stops in good order: pictures that are begun become ready, the others' requests get 503."""

    def __init__(self, config: uvicorn.Config, api: Api, grace: float) -> None:
        super().__init__(config)
        self._api, self._grace = api, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._api.stopping = True
        closing = asyncio.to_thread(self._api.backend.close, self._grace)
        await asyncio.gather(super().shutdown(sockets), closing)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # asked twice: now
            threading.Thread(target=self._api.backend.close).start()
        super().handle_exit(sig, frame)


def serve(backend: Backend, limits: Limits, host: str, port: int, grace: float) -> None:
    """Answer until a signal comes.

    Raises:
        ValueError: it cannot listen there.
    """
    log = logging.getLogger("llamagen")
    key = os.environ.get(KEY_VARIABLE) or None
    if host not in _LOOPBACK and key is None:
        log.warning("anybody who reaches %s can use this server: set %s to ask for a key", host, KEY_VARIABLE)
    listener = listen(host, port)
    server = make_server(backend, limits, key, grace)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended in good order
        signal.signal(number, lambda *_: None)
    log.info("ready: http://%s:%d/v1", f"[{host}]" if ":" in host else host, listener.getsockname()[1])
    server.run(sockets=[listener])
    log.info("stopped")


def make_server(backend: Backend, limits: Limits, key: str | None, grace: float) -> uvicorn.Server:
    """The server, to be run on sockets that listen; ``should_exit = True`` stops it."""
    api = Api(backend, limits, key)
    config = uvicorn.Config(
        api.app, http=ImpatientProtocol, log_config=None, access_log=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=int(grace) + 15, server_header=False,
    )  # fmt: skip
    return _Server(config, api, grace)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}, port {port}: {error}") from error
    listener.listen(2048)
    return listener


def describe(cards: Sequence[Card], where: str) -> list[str]:
    """What is served, for the log."""
    return [
        f"{card.name}: {'classes' if card.kind == 'c2i' else 'texts'}, {card.edge} x {card.edge} pixels, {where}"
        for card in cards
    ]


def backend_of(args: argparse.Namespace, cards: Sequence[Card]) -> Backend:
    """What draws: vLLM or this project's own engines, started.

    Raises:
        ValueError: vLLM was asked for and cannot do it, or a checkpoint is missing or does not fit.
    """
    name, reason = args.backend, None
    if name != "local":
        reason = "vLLM serves one model at a time" if len(cards) > 1 else why_not(cards[0])
    if name == "vllm" and reason:
        raise ValueError(f"{reason}; use --backend local")
    if name == "auto" and vllm_python():
        name = "local" if reason or args.workers is not None else "vllm"
        if reason:
            logging.getLogger("llamagen").info("drawing without vLLM: %s", reason)
    if name == "vllm":
        return vllm_source(cards[0], max_batch_size=args.max_batch_size)
    return local_source(cards, workers=args.workers, max_batch_size=args.max_batch_size)


def _kind_of(words: Sequence[str]) -> str:
    """What --gpt-type says among other flags: it decides the defaults of some of them."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--gpt-type", default="c2i")
    return "t2i" if flags.parse_known_args(words)[0].gpt_type == "t2i" else "c2i"


def main(words: Sequence[str]) -> None:
    """Load the models and serve them."""
    args, model_flags = server_parser().parse_known_args(words)
    kind = _kind_of(model_flags)
    if {"-h", "--help"} & set(model_flags):
        parser(kind).parse_args(["--help"])
    limits = limits_of(args)
    cards = cards_of(given_flags(card_parser(kind), model_flags), args.card)
    log = create_logger(None)
    log.info("loading %s", ", ".join(card.name for card in cards))
    backend = backend_of(args, cards)
    try:
        for line in describe(cards, backend.where):
            log.info("%s", line)
        serve(backend, limits, args.host, args.port, args.grace)
    finally:
        backend.close()


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
