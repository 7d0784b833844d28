"""The page: a tab for each model, and one to draw parts of a picture anew."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.requests import ClientDisconnect

from autoregressive.serve.cards import Card
from autoregressive.serve.requests import Request, Source
from demo.about import model_html
from demo.asking import request_of
from demo.edit_tab import edit_tab
from demo.parts import Controls, Gallery, connect, make_buttons, make_controls, make_results

_HERE = Path(__file__).parent
_PICTURES = 4
# Gradio applies its css option within the page's content alone; this is around it.
_FRAME = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
@media (max-width: 640px) { .gradio-container .main { padding: 10px 12px !important; } }
footer { display: none !important; }
"""


def build_page(source: Source, seed: int | None = None) -> gr.Blocks:
    """The page on the models of `source`. `seed` is what the seed controls show first.

    Launch it with `page_options()`; nothing of it is shared by two people who use it.
    """
    cards = list(source.cards.values())
    with gr.Blocks(title="LlamaGen", **_blocks_options()) as page:
        gr.HTML(_header(source, cards), elem_id="header")
        gallery = Gallery.hidden()
        with gr.Tabs():
            for card in cards:
                with gr.Tab(_tab_name(card, cards)):
                    _drawing_tab(source, card, gallery, seed)
            with gr.Tab("Edit"):
                edit_tab(source, cards, gallery, seed)
    return page


def _blocks_options() -> dict[str, Any]:
    return {"analytics_enabled": False, "fill_width": True, "delete_cache": (3600, 3600), **_style(gr.Blocks)}


def page_options() -> dict[str, Any]:
    """Keywords of `launch`: the looks where this version of Gradio takes them there, and no traces left behind."""
    wanted = {"footer_links": [], "run_history": False, "show_api": False, "ssr_mode": False, "quiet": True}
    known = inspect.signature(gr.Blocks.launch).parameters
    return {**{name: value for name, value in wanted.items() if name in known}, **_style(gr.Blocks.launch)}


def is_no_leaver(record: logging.LogRecord) -> bool:
    """A filter of the web server's log: Gradio takes it for an error that a page is closed while it sends a file."""
    return not (record.exc_info and isinstance(record.exc_info[1], ClientDisconnect))


def _style(taken_by: Callable[..., Any]) -> dict[str, Any]:
    """Theme and style sheet, if `taken_by` takes them: Blocks did until Gradio 6, since then launch does."""
    if "theme" not in inspect.signature(taken_by).parameters:
        return {}
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="zinc", font=fonts, font_mono=("ui-monospace", "Consolas", "monospace")
    ).set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
        block_radius="10px",
        button_large_radius="10px",
        button_small_radius="10px",
    )
    return {"theme": theme, "css": (_HERE / "page.css").read_text(), "head": f"<style>{_FRAME}</style>"}


def _header(source: Source, cards: list[Card]) -> str:
    lines = "".join(f"<li>{model_html(card)}</li>" for card in cards)
    return (
        f"<header><h1>LlamaGen</h1><p>Draws pictures code by code, row by row. "
        f"Runs on <strong>{escape(source.where)}</strong>.</p><ul>{lines}</ul></header>"
    )


def _tab_name(card: Card, cards: list[Card]) -> str:
    name = "Classes" if card.classes else "Text"
    alone = sum(other.kind == card.kind for other in cards) == 1
    return name if alone else f"{name} · {card.name}"


def _drawing_tab(source: Source, card: Card, gallery: Gallery, seed: int | None) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            controls = make_controls(card, seed, _PICTURES)
            buttons = make_buttons()
        with gr.Column(scale=3, min_width=300, elem_classes="beside"):
            results = make_results(buttons, gallery, "Choose what to draw, then press Generate.")

    def ask(*values: Any) -> tuple[Request, Card]:
        return request_of(card, Controls.named(values)), card

    boxes = [box for box in (controls.seed, controls.subject) if isinstance(box, gr.Textbox)]
    connect(results, source, ask, controls.all, boxes)
