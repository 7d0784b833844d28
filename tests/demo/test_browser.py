"""The real page, with small random models, used as people use it: in headless Chromium."""

import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("selenium", reason="selenium is not installed: it drives the browser")

from selenium.webdriver.common.by import By

from autoregressive.sample import sample_c2i
from autoregressive.serve.api import Limits
from autoregressive.serve.batching import local_source
from autoregressive.serve.cards import read_card
from autoregressive.serve.requests import Edit, Sampling
from autoregressive.serve.studio import Job, Studio
from tests.autoregressive.serve.http import serving
from tests.autoregressive.serve.tiny import tiny_card_files
from tests.commands.shell import ROOT, environment
from tests.demo.browser import CHROMIUM, DRIVER, Visitor, shown, start_browser
from tests.processes import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"),
]
AS_CLASS = Sampling(cfg_scale=2.0, top_k=64, top_p=1.0, temperature=1.0)
AS_TEXT = Sampling(cfg_scale=7.5, top_k=64, top_p=1.0, temperature=1.0)
SEED = 42


@pytest.fixture(scope="module")
def card_files(tmp_path_factory):
    """Two quick models, and one that needs minutes for a request."""
    files = tiny_card_files(tmp_path_factory.mktemp("models"))
    slow = files[0].parent / "slow.json"
    card = json.loads(files[0].read_text())
    card["name"] = "slow-class"
    card["flags"] |= {"image-size": 256}
    slow.write_text(json.dumps(card))
    return [*files, slow]


@pytest.fixture(scope="module")
def url(card_files):
    """The page of `python app.py`, in a process of its own."""
    flags = [word for path in card_files for word in ("--card", str(path))]
    with page_of(*flags, "--device", "cpu") as address:
        yield address


@contextlib.contextmanager
def page_of(*flags):
    """The address of the page of a process `python app.py`."""
    port = free_port()
    line = [sys.executable, str(ROOT / "app.py"), *flags, "--port", str(port)]
    app = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}/"
    try:
        _wait_until_it_answers(app, address)
        yield address
    finally:
        app.terminate()
        said = app.communicate(timeout=60)[0]
    assert "Traceback" not in said, said


def _wait_until_it_answers(app, address):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(1200):
        assert app.poll() is None, app.communicate()[0]
        try:
            return opener.open(address, timeout=5).close()
        except OSError:
            time.sleep(0.1)
    raise AssertionError("app.py did not answer")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    browser = start_browser(downloads)
    yield browser
    browser.quit()


@pytest.fixture
def visitor(browser, url):
    visitor = Visitor(browser, url)
    yield visitor
    assert visitor.errors() == []


@pytest.fixture(scope="module")
def expected(card_files):
    """What the models draw: (model, subject, sampling, seeds) to pictures."""
    studio = Studio([read_card(path) for path in card_files[:2]], torch.device("cpu"))

    def draw(model, subject, sampling, seeds, edit=None):
        return studio.draw([Job(model, subject, sampling, seed, edit) for seed in seeds])

    return draw


def test_generate(visitor, expected):
    drawn = visitor.open().generate()
    assert np.array_equal(drawn, expected("tiny-class", 1, AS_CLASS, range(SEED, SEED + 4)))
    assert visitor.note.startswith("4 pictures in ")
    header = visitor.texts("#header")[0]
    assert "tiny-class" in header and "GPT-XS" in header and "cpu, eager" in header and "16 × 16 pixels" in header


def test_a_class_is_found_by_a_part_of_its_name(visitor, expected):
    visitor.open().write("Class", "st")
    visitor.until(lambda: visitor.texts("[role=option]") == ["green star"], "one is left")
    visitor.pick_class("circ", "red circle")
    visitor.write("number input for Number of images", "2")
    visitor.write("Seed", "7")
    assert np.array_equal(visitor.generate(), expected("tiny-class", 0, AS_CLASS, (7, 8)))


def test_a_text(visitor, expected):
    visitor.open("Text").write("Prompt", "a red cat")
    assert np.array_equal(visitor.generate(), expected("tiny-text", "a red cat", AS_TEXT, range(SEED, SEED + 4)))


def test_enter_in_the_seed_draws_and_a_random_seed_is_another_one(visitor, expected):
    visitor.open().write("Seed", "5", end="\n")
    visitor.wait_for("done")
    assert np.array_equal(visitor.pictures()[0], expected("tiny-class", 1, AS_CLASS, [5])[0])
    visitor.press("Random seed")
    seed = int(visitor.until(lambda: (s := visitor.value("Seed")) != "5" and s, "a new seed"))
    assert np.array_equal(visitor.generate()[0], expected("tiny-class", 1, AS_CLASS, [seed])[0])


@pytest.mark.parametrize(
    ("tab", "box", "text", "answer"),
    [
        ("Classes", "Seed", "abc", "The seed is a whole number from 0 to 4294967295, not “abc”."),
        ("Classes", "Seed", "-3", "not “-3”."),
        ("Classes", "Seed", "", "not nothing."),
        ("Text", "Prompt", "", "Write a prompt first"),
    ],
)
def test_a_mistake_is_told_and_can_be_mended(visitor, tab, box, text, answer):
    visitor.open(tab).write(box, text)
    visitor.press("Generate")
    assert answer in visitor.wait_for("failed")
    assert not visitor.all(".board")
    visitor.write(box, "12")
    assert len(visitor.generate()) == 4


def test_too_many_pictures(visitor):
    visitor.open().write("number input for Number of images", "99")
    visitor.press("Generate")
    outcome = visitor.until(
        lambda: visitor.texts(".toast-body") or len(visitor.all(".board [data-state=finished]")) > 15,
        "told, or so many as there may be",
    )
    assert outcome is True or "16" in outcome[0]


def test_two_people_at_once(visitor, url, expected, tmp_path):
    other_browser = start_browser(tmp_path)
    try:
        other = Visitor(other_browser, url).open("Text")
        visitor.open()
        other.write("Prompt", "the dog")
        visitor.pick_class("green", "green star")
        for one in (visitor, other):
            one.press("Generate")
        for one in (visitor, other):
            one.wait_for("done")
        assert np.array_equal(visitor.pictures(), expected("tiny-class", 2, AS_CLASS, range(SEED, SEED + 4)))
        assert np.array_equal(other.pictures(), expected("tiny-text", "the dog", AS_TEXT, range(SEED, SEED + 4)))
        assert other.errors() == []
    finally:
        other_browser.quit()


def start_slow(visitor):
    visitor.open("Classes · slow-class").write("number input for Number of images", "4")
    visitor.press("Generate")
    return visitor.until(lambda: "left" in (words := visitor.note) and words, "it says how long")


def test_progress_and_cancel(visitor, expected):
    words = start_slow(visitor)
    assert " of 16,384 codes, " in words and visitor.all("progress[aria-label='Codes drawn']")
    first = lambda: shown(visitor.all(".board .picture")[0])  # noqa: E731
    preview = visitor.steady(first)
    assert preview.shape == (256, 256, 3) and len(visitor.all(".board .tile")) == 4
    visitor.until(lambda: not np.array_equal(first(), preview), "it goes on")
    visitor.press("Cancel")
    assert visitor.wait_for("stopped").startswith("Stopped")
    assert visitor.steady(lambda: visitor.button("Generate").is_enabled()) and visitor.all(".board .picture")
    # the models are free again: the slow request would have kept them for minutes
    drawn = visitor.go_to("Classes · tiny-class").generate()
    assert np.array_equal(drawn, expected("tiny-class", 1, AS_CLASS, range(SEED, SEED + 4)))


def test_a_closed_tab_stops_the_drawing(visitor, url, expected, tmp_path):
    gone = start_browser(tmp_path)
    try:
        start_slow(Visitor(gone, url))
    finally:
        gone.quit()
    drawn = visitor.open().generate()
    assert np.array_equal(drawn, expected("tiny-class", 1, AS_CLASS, range(SEED, SEED + 4)))


def test_saved_files_hold_their_settings(visitor, downloads, expected):
    visitor.open().pick_class("green", "green star")
    visitor.generate()
    visitor.click("a.save", place=1)
    file = downloads / "tiny-class-green-star-43.png"
    visitor.until(file.exists, "the file is saved")
    picture = Image.open(file)
    assert np.array_equal(np.array(picture), expected("tiny-class", 2, AS_CLASS, [43])[0])
    assert picture.text["class_name"] == "green star" and picture.text["seed"] == "43"
    assert json.loads(picture.text["settings"]) == vars(AS_CLASS)
    visitor.click("a.save.all")
    visitor.until((downloads / "tiny-class-green-star.zip").exists, "all are saved")
    with zipfile.ZipFile(downloads / "tiny-class-green-star.zip") as archive:
        assert len(archive.namelist()) == 4 and archive.read(file.name) == file.read_bytes()


def test_the_line_on_the_page_draws_the_same_pictures(visitor, tmp_path):
    drawn = visitor.open().generate()
    visitor.click(".again summary")
    line = visitor.until(lambda: visitor.texts(".again pre")[0], "the line")
    args = sample_c2i.parser().parse_args([*shlex.split(line)[2:], "--output-dir", str(tmp_path)])
    sample_c2i.main(args)
    assert np.array_equal([np.array(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))], drawn)


def edited(expected, visitor, picture, model, subject, sampling):
    """Check that the pictures on the board are edits of `picture`; returns the cells that are drawn anew."""
    files = visitor.files()
    cells = json.loads(files[0].text["cells"])
    edit = Edit(picture, np.isin(np.arange(16), cells))
    assert np.array_equal([np.array(file) for file in files], expected(model, subject, sampling, range(42, 45), edit))
    return cells


def test_editing_a_drawn_picture(visitor, expected):
    visitor.open().pick_class("circ", "red circle")
    drawn = visitor.generate()
    visitor.go_to("Edit").press("Generate")
    assert "Choose a picture first" in visitor.wait_for("failed")
    visitor.until(lambda: len(visitor.all(".kept .thumbnail-item")) == 4, "drawn pictures are offered")
    visitor.click(".kept .thumbnail-item", place=1)
    visitor.until(lambda: visitor.value("Class") == "red circle", "its class is picked")
    visitor.until(lambda: visitor.press("Generate") or "Nothing is painted" in visitor.note, "no paint")
    visitor.paint((-0.15, 0.25), (0.15, 0.25))
    visitor.generate()
    count = visitor.marked_cells()
    cells = edited(expected, visitor, drawn[1], "tiny-class", 0, AS_CLASS)
    assert len(cells) == count and min(cells) >= 8  # the lower half was painted
    visitor.click("input[type=checkbox]")
    visitor.until(lambda: visitor.marked_cells() == 16 - min(cells), "all that follow")


def test_a_picture_of_a_text_brings_its_model_and_its_text(visitor):
    visitor.open("Text").write("Prompt", "a red cat")
    visitor.generate()
    visitor.go_to("Edit").click(".kept .thumbnail-item")
    visitor.until(lambda: visitor.value("Prompt") == "a red cat", "its text is there")
    assert visitor.steady(lambda: visitor.all("label.selected")[0].text) == "tiny-text"


def test_editing_an_uploaded_picture_by_a_text(visitor, expected, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    Image.new("RGB", (300, 200), (200, 30, 30)).save(tmp_path / "red.png")
    visitor.open("Edit")
    upload = "input[data-testid='Upload a picture-upload-button']"
    visitor.browser.find_element(By.CSS_SELECTOR, upload).send_keys(str(broken))
    visitor.until(lambda: "no picture that can be read" in visitor.texts(".toast-body")[0], "it is told")
    visitor.browser.find_element(By.CSS_SELECTOR, upload).send_keys(str(tmp_path / "red.png"))
    visitor.click("label", "tiny-text")
    visitor.write("Prompt", "a red cat")
    visitor.paint((-0.1, -0.1), (0.1, 0.1))
    assert visitor.steady(lambda: shown(visitor.all(".marked img")[0]))[2, 2].tolist() == [200, 30, 30]
    visitor.generate()
    edited(expected, visitor, np.full((16, 16, 3), (200, 30, 30), np.uint8), "tiny-text", "a red cat", AS_TEXT)


def test_who_leaves_while_a_file_is_sent_leaves_no_traceback(url):
    """In what app.py prints: the end of the fixture `url` looks at it."""
    place = urllib.parse.urlsplit(url)
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 9999\r\n"
        "Content-Type: multipart/form-data; boundary=edge\r\n\r\n--edge\r\n"
    )
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head.encode())
        time.sleep(0.5)
    time.sleep(0.5)


def test_on_a_server(browser, card_files, expected):
    source = local_source([read_card(path) for path in card_files[:2]], workers=0)
    with (
        contextlib.closing(source),
        serving(source, Limits(max_n=5)) as address,
        page_of("--server-url", address) as url,
    ):
        visitor = Visitor(browser, url).open()
        assert address in visitor.texts("#header")[0]
        drawn = visitor.generate()
        assert np.array_equal(drawn, expected("tiny-class", 1, AS_CLASS, range(SEED, SEED + 4)))
        visitor.write("number input for Number of images", "6")
        visitor.press("Generate")
        assert "5" in visitor.wait_for("failed")
        visitor.go_to("Edit").click(".kept .thumbnail-item")
        visitor.paint((0, 0.2), (0.1, 0.2))
        visitor.generate()
        edited(expected, visitor, drawn[0], "tiny-class", 1, AS_CLASS)
        assert visitor.errors() == []
        browser.get("about:blank")  # a page whose server ends would complain


@pytest.mark.parametrize("width", [390, 360])
def test_on_a_phone_nothing_is_wider_than_the_screen(url, tmp_path, width):
    phone = start_browser(tmp_path, width, 844, phone=True)
    try:
        visitor = Visitor(phone, url).open()
        visitor.generate()
        for tab in ("Classes", "Text", "Edit"):
            visitor.go_to(tab)
            widths = phone.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert widths == [width, width], tab
        assert visitor.errors() == []
    finally:
        phone.quit()


def test_every_control_has_a_name_for_those_who_cannot_see_it(visitor):
    visitor.open().generate()
    assert visitor.nameless() == []
    assert visitor.go_to("Text").nameless() == []
    assert visitor.go_to("Edit").nameless() == []
    assert visitor.steady(lambda: all(image.get_attribute("alt") for image in visitor.all("img.picture")))


def test_the_page_asks_nobody_else_for_anything(visitor):
    visitor.open().generate()
    asked = visitor.browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert len(asked) > 10
    assert [name for name in asked if not name.startswith((visitor.url, "data:", "blob:"))] == []
