"""What the page's tabs are made of: controls, results, and a request on its way from the ones to the others."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from autoregressive.serve.cards import Card
from autoregressive.serve.requests import LARGEST_SEED, BadRequest, Failed, Request, Source
from demo.asking import LONGEST_PROMPT, MOST_PICTURES, Start, class_choices, first_class, start_of
from demo.board import Board, again_html, board_html, note_html, status_html
from demo.watching import Stop, boards

_log = logging.getLogger("llamagen.demo")
_MOST_KEPT = 24
_STOPPED = "Stopped. What was drawn so far stays here."
_QUICK = {"show_progress": "hidden", "queue": False}


@dataclass(frozen=True)
class Picture:
    """A picture of a session, uint8 (edge, edge, 3), and what drew it of what."""

    pixels: np.ndarray
    model: str
    subject: int | str


Kept = list[Picture]  # newest first


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
    def named(cls, values: Sequence[Any]) -> dict[str, Any]:
        """Values in that order by the controls' names."""
        return dict(zip([part.name for part in fields(cls)], values, strict=True))


@dataclass(frozen=True)
class Gallery:
    """The pictures of a session, which the editing tab offers."""

    kept: gr.State
    shown: gr.Gallery

    @classmethod
    def hidden(cls) -> Gallery:
        """Made, and not on the page yet."""
        shown = gr.Gallery(
            label="Drawn here", columns=8, allow_preview=False, object_fit="contain", format="png", interactive=False,
            render=False, elem_classes="kept crisp",
        )  # fmt: skip
        return cls(gr.State([]), shown)


@dataclass(frozen=True)
class Results:
    """Where a request's pictures go."""

    draw: gr.Button
    stop: gr.Button
    status: gr.HTML
    board: gr.HTML
    again: gr.HTML
    gallery: Gallery

    @property
    def all(self) -> list[gr.components.Component]:
        """In the order in which `drawing` yields them."""
        shown = [self.draw, self.stop, self.status, self.board, self.again]
        return [*shown, self.gallery.kept, self.gallery.shown]


def make_controls(card: Card, seed: int | None, count: int, compact: bool = False) -> Controls:
    """The controls of a model, with its start values; `compact` shows what it draws, and the rest when asked to."""
    start = start_of(card, seed)
    subject = _class_picker(card) if card.classes else _prompt(card)
    if not compact:
        which = _which_pictures(start, count)
    with gr.Accordion("More settings" if compact else "How it draws", open=False):
        if compact:
            which = _which_pictures(start, count)
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
    return Controls(subject, *which, *sliders)


def _which_pictures(start: Start, count: int) -> tuple[gr.Slider, gr.Textbox]:
    n = gr.Slider(1, MOST_PICTURES, count, step=1, label="Number of images")
    with gr.Row(equal_height=True, elem_classes="seed-row"):
        seed = gr.Textbox(str(start.seed), label="Seed", max_lines=1, min_width=120, scale=3)
        dice = gr.Button("Random seed", min_width=110, scale=2, size="sm", elem_classes="dice")
    dice.click(lambda: str(random.randint(0, LARGEST_SEED)), None, seed, **_QUICK)
    return n, seed


def _class_picker(card: Card) -> gr.Dropdown:
    info = "Type a part of a name to find it."
    return gr.Dropdown(class_choices(card), value=first_class(card), label="Class", info=info, filterable=True)


def _prompt(card: Card) -> gr.Textbox:
    examples = list(card.examples)
    prompt = gr.Textbox(
        examples[0] if examples else "", label="Prompt", lines=2, max_lines=4, max_length=LONGEST_PROMPT,
        placeholder="What should the picture show?",
    )  # fmt: skip
    if examples:
        gr.Examples([[example] for example in examples], prompt, label="Prompts to begin with")
    return prompt


def make_buttons() -> tuple[gr.Button, gr.Button]:
    """Generate and Cancel."""
    with gr.Row(elem_classes="go"):
        draw = gr.Button("Generate", variant="primary", size="lg", min_width=120, scale=2)
        stop = gr.Button("Cancel", variant="stop", size="lg", min_width=100, scale=1, interactive=False)
    return draw, stop


def make_results(buttons: tuple[gr.Button, gr.Button], gallery: Gallery, words: str) -> Results:
    """A line of words, pictures, and what can be done with them."""
    return Results(*buttons, gr.HTML(note_html(words, "ready")), gr.HTML(""), gr.HTML(""), gallery)


def connect(
    results: Results,
    source: Source,
    ask: Callable[..., tuple[Request, Card]],
    inputs: Sequence[gr.components.Component],
    submits: Sequence[gr.Textbox],
) -> None:
    """Draw the request that `ask` makes of the values of `inputs` at the press of the button, or Enter in `submits`.

    `ask` raises BadRequest for values that make none.
    """

    stop = gr.State(Stop())  # a copy for each session, the same object in both functions

    async def on_draw(stop: Stop, kept: Kept, *values: Any) -> AsyncIterator[list[Any]]:
        async for update in drawing(source, kept, lambda: ask(*values), stop):
            yield update

    gr.on(
        [results.draw.click, *(box.submit for box in submits)], on_draw, [stop, results.gallery.kept, *inputs],
        results.all, show_progress="hidden", concurrency_limit=None, trigger_mode="once",
    )  # fmt: skip
    results.stop.click(_ask_to_stop, stop, None, **_QUICK)


def _ask_to_stop(stop: Stop) -> None:
    # The drawing itself says that it has stopped. Gradio's `cancels` has two streams of updates: one on its way
    # when the button is pressed may come last, and the page would say for ever that it draws.
    stop.asked = True


async def drawing(
    source: Source, kept: Kept, ask: Callable[[], tuple[Request, Card]], stop: Stop
) -> AsyncIterator[list[Any]]:
    """Updates of `Results.all` from the press of the button to the last picture. A mistake is told, not raised."""
    stop.asked = False
    try:
        request, card = ask()
        async for board in boards(source, request, card, stop):
            if not board.finished:
                yield [*_busy(), status_html(board), board_html(board), "", gr.skip(), gr.skip()]
        if board.finished:
            yield [*_idle(), status_html(board), board_html(board), again_html(board), *_with_new(kept, board)]
        else:
            yield [*_idle(), note_html(_STOPPED, "stopped"), board_html(board), "", gr.skip(), gr.skip()]
    except (BadRequest, Failed) as error:
        yield told(str(error))
    except Exception:
        _log.exception("a request could not be drawn")
        yield told("Something went wrong here; the terminal in which app.py runs says what.")


def _with_new(kept: Kept, board: Board) -> tuple[Kept, list[np.ndarray]]:
    of = (board.request.model, board.request.subject)
    new = [Picture(tile.picture, *of) for tile in board.tiles if tile.picture is not None]
    kept = [*new, *kept][:_MOST_KEPT]
    return kept, [picture.pixels for picture in kept]


def told(message: str) -> list[Any]:
    """Updates of `Results.all` that say what was wrong, and leave earlier pictures where they are."""
    gr.Warning(escape(message))
    return [*_idle(), note_html(message, "failed"), gr.skip(), gr.skip(), gr.skip(), gr.skip()]


def _idle() -> list[Any]:
    return [gr.update(interactive=True), gr.update(interactive=False)]


def _busy() -> list[Any]:
    return [gr.update(interactive=False), gr.update(interactive=True)]
