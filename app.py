"""A page in the browser that draws pictures: of classes, of texts, and parts of pictures anew.

    python app.py

draws with the small models that come with the project, on any machine. With your own:

    python app.py --vq-ckpt vq_ds16_c2i.pt --gpt-ckpt c2i_XL_384.pt --gpt-model GPT-XL --image-size 384

With --server-url the page draws on a server that autoregressive/serve/server.py runs, here or elsewhere; the key that
it asks for is in the environment's LLAMAGEN_API_KEY. --cfg-scale, --top-k, --top-p, --temperature and --seed are what
the page shows first.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started by file path, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent)

from autoregressive.serve.cards import given_flags
from demo.models import add_model_flags, cards_of_server, page_cards
from utils.args import add_seed_arg, make_parser
from utils.errors import run

_PAGE = ("host", "port", "share", "server_url", "seed")


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    page = flags.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of them")
    page.add_argument("--port", type=int, help="the default is the first free one from 7860 on")
    page.add_argument("--share", action="store_true", help="also a public address, through Gradio's servers")
    page.add_argument("--server-url", help="draw on this server, such as http://127.0.0.1:8000, not in this process")
    add_seed_arg(page, "--seed", default=42, help="the seed that the page shows first")
    add_model_flags(flags)
    return flags


def main(given: dict[str, Any]) -> None:
    """Load the models or find the server, and serve the page until Ctrl-C."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere
    from demo.page import build_page, is_no_leaver, page_options  # here, as Gradio takes seconds to import

    of_model = {name: value for name, value in given.items() if name not in _PAGE}
    with contextlib.closing(_source(given.get("server_url"), of_model)) as source:
        page = build_page(source, given.get("seed"))
        logging.getLogger("uvicorn.error").addFilter(is_no_leaver)
        page.queue(default_concurrency_limit=None, max_size=256)
        _, address, public = page.launch(
            server_name=given.get("host", "127.0.0.1"),
            server_port=given.get("port"),
            share=given.get("share", False),
            prevent_thread_lock=True,
            **page_options(),
        )
        print(f"the page is at {' and '.join(filter(None, (address, public)))} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def _source(server_url: str | None, of_model: dict[str, Any]) -> Any:
    """What draws; to be closed in the end."""
    if server_url:
        from autoregressive.serve.client import server_source

        source = server_source(server_url)
        source.cards = cards_of_server(source.cards, of_model)
        return source
    from autoregressive.serve.batching import local_source

    cards = page_cards(of_model)
    print(f"loading {', '.join(card.name for card in cards)}", flush=True)
    return local_source(cards, workers=0)


if __name__ == "__main__":
    run(lambda: main(given_flags(parser())))
