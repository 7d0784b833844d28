"""The page as it is built, and what happens on it from the press of a button on, without a browser."""

import asyncio
import logging

import gradio as gr
import numpy as np
import pytest
from starlette.requests import ClientDisconnect

from autoregressive.serve.requests import BadRequest, Request, Sampling
from demo import parts
from demo.page import build_page, is_no_leaver, page_options
from demo.parts import drawing
from demo.watching import Stop
from tests.demo.fakes import FakeSource

PLAIN = Sampling(2.0, 0, 1.0, 1.0)
OLD = parts.Picture(np.zeros((16, 16, 3), np.uint8), "tiny-text", "a red cat")
CONTROLS = (gr.Slider, gr.Textbox, gr.Dropdown, gr.Radio, gr.Checkbox, gr.ImageEditor, gr.Gallery)
SHOWN = ("draw", "stop", "status", "board", "again", "kept", "gallery")


def updates(source, ask, kept=(), stop=None):
    async def press():
        shown = drawing(source, list(kept), ask, stop or Stop())
        return [dict(zip(SHOWN, update, strict=True)) async for update in shown]

    return asyncio.run(press())


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    return said


def test_every_control_has_a_label(cards):
    blocks = build_page(FakeSource(cards)).blocks.values()
    controls = [block for block in blocks if isinstance(block, CONTROLS)]
    assert len(controls) > 20 and all(control.label for control in controls)
    assert all(block.value for block in blocks if isinstance(block, gr.Button))
    assert [tab.label for tab in blocks if isinstance(tab, gr.Tab)] == ["Classes", "Text", "Edit"]


def test_the_first_class_is_one_of_the_list_and_controls_start_as_the_card_says(of_classes):
    blocks = build_page(FakeSource([of_classes]), seed=9).blocks.values()
    picker = next(block for block in blocks if isinstance(block, gr.Dropdown))
    assert picker.value in [value for _, value in picker.choices]
    sliders = {block.label: block for block in blocks if isinstance(block, gr.Slider)}
    assert sliders["Guidance"].value == 2.0 and (sliders["Top-k"].value, sliders["Top-k"].maximum) == (64, 64)
    assert sliders["Number of images"].maximum == 16
    assert next(block for block in blocks if isinstance(block, gr.Textbox)).value == "9"


def test_the_header_says_what_runs(cards):
    header = next(block.value for block in build_page(FakeSource(cards)).blocks.values() if isinstance(block, gr.HTML))
    assert "nothing" in header and "tiny-class" in header and "tiny-text" in header and "GPT-XS" in header


def test_nothing_is_fetched_or_sent(cards):
    page, options = build_page(FakeSource(cards)), page_options()
    theme = options.get("theme") or page.theme
    assert not page.analytics_enabled and theme._stylesheets == []
    assert "http" not in (options.get("css") or page.css)


def test_only_who_leaves_is_left_out_of_the_log(caplog):
    log = logging.getLogger("a web server")
    log.addFilter(is_no_leaver)
    for error in (ClientDisconnect(), OSError("disk full")):
        try:
            raise error
        except Exception:
            log.exception("in an upload")
    log.error("no exception at all")
    assert [record.exc_info and str(record.exc_info[1]) for record in caplog.records] == ["disk full", None]


def test_from_the_button_to_the_pictures(cards):
    source, request = FakeSource(cards), Request("tiny-class", 2, PLAIN, seed=3, n=2)
    shown = updates(source, lambda: (request, cards[0]), kept=[OLD])
    first, last = shown[0], shown[-1]
    assert not first["draw"]["interactive"] and first["stop"]["interactive"] and "drawing" in first["status"]
    assert last["draw"]["interactive"] and not last["stop"]["interactive"] and 'data-state="done"' in last["status"]
    assert last["board"].count("Save PNG") == 2 and "sample_c2i.py" in last["again"]
    second = last["kept"][1]
    assert len(last["kept"]) == 3 and np.array_equal(second.pixels, source.picture(request, 1))
    assert (second.model, second.subject) == ("tiny-class", 2) and last["kept"][2] is OLD
    assert np.array_equal(last["gallery"], [picture.pixels for picture in last["kept"]])


def test_a_stopped_drawing_says_so_last_and_the_next_one_begins(cards):
    stop = Stop()

    class Impatient(FakeSource):
        async def draw(self, request):
            async for event in super().draw(request):
                stop.asked = event.number == 1
                yield event

    source, request = Impatient(cards, wait=0.05), Request("tiny-class", 2, PLAIN, n=2)
    shown = updates(source, lambda: (request, cards[0]), stop=stop)
    last = shown[-1]
    assert all('data-state="drawing"' in one["status"] for one in shown[:-1]) and source.closed == 1
    assert 'data-state="stopped"' in last["status"] and last["draw"]["interactive"] and not last["stop"]["interactive"]
    assert last["board"].count("Save PNG") == 1 and last["kept"] == gr.skip()
    assert 'data-state="done"' in updates(FakeSource(cards), lambda: (request, cards[0]), stop=stop)[-1]["status"]


def test_only_so_many_pictures_are_kept(cards):
    many = [OLD] * parts._MOST_KEPT
    last = updates(FakeSource(cards), lambda: (Request("tiny-class", 2, PLAIN), cards[0]), many)[-1]
    assert len(last["kept"]) == parts._MOST_KEPT and last["kept"][0] is not OLD


def test_a_mistake_is_told_and_pictures_stay(cards, warnings):
    def ask():
        raise BadRequest("The seed is <wrong>.", "seed")

    (told,) = updates(FakeSource(cards), ask)
    assert warnings == ["The seed is &lt;wrong&gt;."]
    assert 'role="alert">The seed is &lt;wrong&gt;.' in told["status"] and told["draw"]["interactive"]
    assert told["board"] == gr.skip()


def test_what_fails_is_told(cards, warnings):
    source = FakeSource(cards, fails=True)
    last = updates(source, lambda: (Request("tiny-class", 2, PLAIN), cards[0]))[-1]
    assert "it broke twice" in last["status"] and last["draw"]["interactive"]
    bug = updates(source, lambda: 1 / 0)[-1]
    assert "Something went wrong" in bug["status"] and "division" not in str(bug)
