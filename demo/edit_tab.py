"""The tab that draws painted parts of a picture anew."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from autoregressive.serve.cards import Card
from autoregressive.serve.requests import BadRequest, Edit, Request, Source
from demo.asking import request_of
from demo.parts import Controls, Gallery, Kept, connect, make_buttons, make_controls, make_results
from demo.retouch import CANVAS, canvas_of, edit_of, marked_html, read_upload

_RESULTS = 3
_REST = "Also draw everything that comes after it"
_REST_INFO = "The picture is drawn row by row; what comes after the painted part does not know of it otherwise."
_QUICK = {"show_progress": "hidden", "concurrency_limit": None}


def edit_tab(source: Source, cards: list[Card], gallery: Gallery, seed: int | None) -> None:
    """Choose a picture, paint, say what to draw there."""
    edge = max(card.edge for card in cards)
    picture = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            gr.HTML(_step(1, "Choose a picture"))
            gallery.shown.render()
            upload = gr.UploadButton("Upload a picture", file_types=["image"], type="filepath", size="sm")
            gr.HTML(_step(2, "Paint over the part to draw anew"))
            editor = _editor()
            gr.HTML(_step(3, "Say what to draw there"))
            names = [card.name for card in cards]
            model = gr.Radio(names, value=names[0], label="Model", visible=len(cards) > 1)
            groups, controls = [], []
            for number, card in enumerate(cards):
                with gr.Column(visible=number == 0) as group:
                    controls.append(make_controls(card, seed, _RESULTS, compact=True))
                groups.append(group)
            rest = gr.Checkbox(False, label=_REST, info=_REST_INFO)
            buttons = make_buttons()
        with gr.Column(scale=1, min_width=300, elem_classes="beside"):
            marked = gr.HTML("")
            results = make_results(buttons, gallery, "Choose a picture and paint over a part of it.")

    def take_drawn(kept: Kept, event: gr.SelectData) -> list[Any]:
        if event.index >= len(kept):
            return [gr.skip()] * (3 + len(names))
        drawn = kept[event.index]
        subjects = [drawn.subject if name == drawn.model else gr.skip() for name in names]
        return [*_chosen(drawn.pixels), drawn.model, *subjects]

    def take_upload(path: str | None) -> list[Any]:
        try:
            return _chosen(read_upload(path, edge))
        except BadRequest as error:
            gr.Warning(str(error))
            return [gr.skip(), gr.skip()]

    def show_cells(picture: np.ndarray | None, painting: Any, rest: bool, name: str) -> str:
        try:
            return marked_html(edit_of(picture, painting, rest, source.cards[name]))
        except BadRequest:  # nothing painted yet
            return ""

    def ask(picture: np.ndarray | None, painting: Any, rest: bool, name: str, *values: Any) -> tuple[Request, Card]:
        card, each = source.cards[name], len(Controls.named(values[: len(controls[0].all)]))
        first = names.index(name) * each
        edit: Edit = edit_of(picture, painting, rest, card)
        return request_of(card, Controls.named(values[first : first + each]), edit), card

    subjects = [part.subject for part in controls]
    gallery.shown.select(take_drawn, gallery.kept, [picture, editor, model, *subjects], **_QUICK)
    upload.upload(take_upload, upload, [picture, editor], **_QUICK)
    model.change(lambda name: [gr.update(visible=name == one) for one in names], model, groups, **_QUICK)
    looked_at = [picture, editor, rest, model]
    gr.on(
        [editor.change, rest.change, model.change], show_cells, looked_at, marked, trigger_mode="always_last", **_QUICK
    )
    boxes = [box for part in controls for box in (part.seed, part.subject) if isinstance(box, gr.Textbox)]
    connect(results, source, ask, [*looked_at, *(one for part in controls for one in part.all)], boxes)


def _step(number: int, words: str) -> str:
    return f'<h2 class="step"><span>{number}</span> {words}</h2>'


def _editor() -> gr.ImageEditor:
    return gr.ImageEditor(
        label="Picture to paint on", type="numpy", image_mode="RGBA", format="png", sources=(), transforms=(),
        brush=gr.Brush(default_size=CANVAS // 8, colors=[("#14b8a6", 0.75)], color_mode="fixed"), layers=False,
        eraser=gr.Eraser(default_size=CANVAS // 8), canvas_size=(CANVAS, CANVAS), height=460,
        elem_classes="crisp paint",
    )  # fmt: skip


def _chosen(picture: np.ndarray) -> list[Any]:
    return [picture, {"background": canvas_of(picture), "layers": [], "composite": None}]
