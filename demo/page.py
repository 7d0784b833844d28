"""The page: a tab for each model, and one to draw parts of a picture anew."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from autoregressive.serve.cards import Card
from autoregressive.serve.requests import LARGEST_SEED, BadRequest, Edit, Failed, Source
from demo.about import model_html
from demo.asking import LONGEST_PROMPT, MOST_PICTURES, class_choices, first_class, request_of, start_of
from demo.board import Board, again_html, board_html, note_html, status_html
from demo.watching import boards

_log = logging.getLogger("llamagen.demo")
_HERE = Path(__file__).parent
_MOST_KEPT = 12  # drawn pictures that the editing tab offers
_PICTURES = 4


@dataclass(frozen=True)
class Controls:
    """What a request is made of, in the order in which the page's functions get the values."""

    subject: gr.components.Component
    n: gr.Slider
    seed: gr.Textbox
    cfg_scale: gr.Slider
    top_k: gr.Slider
    top_p: gr.Slider
    temperature: gr.Slider

    @property
    def all(self) -> list[gr.components.Component]:
        """The controls in order."""
        return [getattr(self, part.name) for part in fields(self)]

    @classmethod
    def named(cls, values: tuple[Any, ...]) -> dict[str, Any]:
        """Values in that order by the controls' names."""
        return dict(zip([part.name for part in fields(cls)], values, strict=True))


@dataclass(frozen=True)
class Results:
    """Where a request's pictures go."""

    draw: gr.Button
    stop: gr.Button
    status: gr.HTML
    board: gr.HTML
    again: gr.HTML

    @property
    def all(self) -> list[gr.components.Component]:
        """In the order in which `drawing` yields them."""
        return [self.draw, self.stop, self.status, self.board, self.again]


def build_page(source: Source, seed: int | None = None) -> gr.Blocks:
    """The page on the models of `source`. `seed` is what the seed controls show first.

    Launch it with `page_options()`; nothing of it is shared by two people who use it.
    """
    cards = list(source.cards.values())
    with gr.Blocks(title="LlamaGen", **_blocks_options()) as page:
        gr.HTML(_header(source, cards), elem_id="header")
        with gr.Tabs():
            for card in cards:
                with gr.Tab(_tab_name(card, cards)):
                    _drawing_tab(source, card, seed)
    return page


def _blocks_options() -> dict[str, Any]:
    return {"analytics_enabled": False, "fill_width": True, "delete_cache": (3600, 3600), **_style(gr.Blocks)}


def page_options() -> dict[str, Any]:
    """Keywords of `launch`: the looks where this version of Gradio takes them there, and no traces left behind."""
    wanted = {"footer_links": [], "run_history": False, "show_api": False, "ssr_mode": False, "quiet": True}
    known = inspect.signature(gr.Blocks.launch).parameters
    return {**{name: value for name, value in wanted.items() if name in known}, **_style(gr.Blocks.launch)}


def _style(taken_by: Callable[..., Any]) -> dict[str, Any]:
    """Theme and style sheet, if `taken_by` takes them: Blocks did until Gradio 6, since then launch does."""
    if "theme" not in inspect.signature(taken_by).parameters:
        return {}
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="zinc", font=fonts, font_mono=("ui-monospace", "Consolas", "monospace")
    )
    return {"theme": theme, "css": (_HERE / "page.css").read_text()}


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


def _drawing_tab(source: Source, card: Card, seed: int | None) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            controls = _controls(card, seed, _PICTURES)
            draw, stop = _buttons()
        with gr.Column(scale=3, min_width=300):
            results = _results(draw, stop, "Choose what to draw, then press Draw.")

    async def on_draw(*values: Any) -> AsyncIterator[list[Any]]:
        async for update in _drawing(source, card, Controls.named(values)):
            yield update

    _connect(results, on_draw, controls)


def _connect(results: Results, on_draw: Callable[..., Any], controls: Controls, more: tuple = ()) -> None:
    """Draw and Stop; Enter in the seed or the prompt draws too."""
    inputs = [*more, *controls.all]
    options = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "once"}
    triggers = [results.draw.click, controls.seed.submit]
    if isinstance(controls.subject, gr.Textbox):
        triggers.append(controls.subject.submit)
    started = gr.on(triggers, on_draw, inputs, results.all, **options)
    results.stop.click(_stopped, None, [results.draw, results.stop, results.status], cancels=[started], queue=False)


def _stopped() -> list[Any]:
    return [*_idle(), note_html("Stopped. What was drawn so far stays here.", "stopped")]


def _controls(card: Card, seed: int | None, count: int) -> Controls:
    start = start_of(card, seed)
    subject = _class_picker(card) if card.classes else _prompt(card)
    n = gr.Slider(1, MOST_PICTURES, count, step=1, label="Number of images")
    with gr.Row(equal_height=True, elem_classes="seed-row"):
        seed_box = gr.Textbox(str(start.seed), label="Seed", max_lines=1, min_width=120, scale=3)
        dice = gr.Button("Random seed", min_width=120, scale=2, elem_classes="dice")
    dice.click(lambda: str(random.randint(0, LARGEST_SEED)), None, seed_box, show_progress="hidden", queue=False)
    with gr.Accordion("How it draws", open=False):
        sliders = [
            gr.Slider(1, start.most_guidance, start.cfg_scale, step=0.1, label="Guidance",
                      info="How strongly to follow what was asked for; 1 is no guidance."),
            gr.Slider(1, start.most_codes, start.top_k, step=1, label="Top-k",
                      info="Draw each code from so many of the likeliest."),
            gr.Slider(0, 1, start.top_p, step=0.01, label="Top-p",
                      info="Draw from the likeliest codes that together have this probability."),
            gr.Slider(0, start.most_temperature, start.temperature, step=0.05, label="Temperature",
                      info="0 always takes the likeliest code."),
        ]  # fmt: skip
    return Controls(subject, n, seed_box, *sliders)


def _class_picker(card: Card) -> gr.Dropdown:
    return gr.Dropdown(
        class_choices(card), value=first_class(card), label="Class", info="Type a part of a name to find it.",
        filterable=True,
    )  # fmt: skip


def _prompt(card: Card) -> gr.Textbox:
    examples = list(card.examples)
    prompt = gr.Textbox(
        examples[0] if examples else "", label="Prompt", lines=2, max_lines=4, max_length=LONGEST_PROMPT,
        placeholder="What should the picture show?", submit_btn=False,
    )  # fmt: skip
    if examples:
        gr.Examples([[example] for example in examples], prompt, label="Prompts to begin with")
    return prompt


def _buttons() -> tuple[gr.Button, gr.Button]:
    with gr.Row(elem_classes="go"):
        draw = gr.Button("Generate", variant="primary", size="lg", min_width=120, scale=2)
        stop = gr.Button("Cancel", variant="stop", size="lg", min_width=100, scale=1, interactive=False)
    return draw, stop


def _results(draw: gr.Button, stop: gr.Button, words: str) -> Results:
    status = gr.HTML(note_html(words, "ready"))
    return Results(draw, stop, status, gr.HTML(""), gr.HTML(""))


def _idle() -> list[Any]:
    return [gr.update(interactive=True), gr.update(interactive=False)]


def _busy() -> list[Any]:
    return [gr.update(interactive=False), gr.update(interactive=True)]


async def _drawing(
    source: Source, card: Card, values: dict[str, Any], edit: Edit | None = None
) -> AsyncIterator[list[Any]]:
    """Updates of `Results.all` from the press of the button to the last picture. A mistake is told, not raised."""
    board: Board | None = None
    try:
        async for board in boards(source, request_of(card, values, edit), card):
            if board.finished:
                break
            yield [*_busy(), status_html(board), board_html(board), ""]
        if board is not None:
            yield [*_idle(), status_html(board), board_html(board), again_html(board)]
    except (BadRequest, Failed) as error:
        yield _told(str(error))
    except Exception:
        _log.exception("a request could not be drawn")
        yield _told("Something went wrong here; the terminal in which app.py runs says what.")


def _told(message: str) -> list[Any]:
    gr.Warning(escape(message))
    return [*_idle(), note_html(message, "failed"), gr.update(), gr.update()]
