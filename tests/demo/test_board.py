"""What the page says and shows of pictures on their way."""

import base64
import html
import io
import re
import zipfile

import numpy as np
from PIL import Image

from autoregressive.serve.requests import Drawn, Progress, Request, Sampling
from demo.board import Board, again_html, board_html, file_name, note_html, seconds, status_html

PLAIN = Sampling(2.0, 0, 1.0, 1.0)
PICTURE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)


def board_of(card, subject=1, n=2, clock=lambda: 0.0):
    return Board(Request(card.name, subject, PLAIN, seed=5, n=n), card, clock)


def drawn(card, **options):
    board = board_of(card, **options)
    for number in range(board.request.n):
        board.take(Drawn(number, PICTURE))
    return board


def png(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split("base64,")[1])))


def test_how_far_and_how_long(of_classes):
    now = [0.0]
    board = board_of(of_classes, clock=lambda: now[0])
    now[0] = 2.4
    assert board.in_words() == "Waiting for a free place, 2 s so far"
    now[0] = 3.0
    board.take(Progress(0, 8, 16))
    assert board.in_words() == "8 of 32 codes, 9 s left"
    board.take(Drawn(0, PICTURE))
    assert board.in_words() == "16 of 32 codes, 3 s left, 1 of 2 pictures ready"
    board.take(Progress(0, 3, 16))  # late news of a picture that is there
    assert board.codes == (16, 32)
    now[0] = 5.0
    board.take(Drawn(1, PICTURE))
    assert board.finished and board.in_words() == "2 pictures in 5 s"
    assert 'value="8" max="32"' not in status_html(board) and 'data-state="done"' in status_html(board)


def test_an_edit_has_fewer_codes(of_classes):
    board = board_of(of_classes, n=1)
    board.take(Progress(0, 2, 7))
    assert board.codes == (2, 7)


def test_previews_stay_until_there_are_newer_ones(of_classes):
    board = board_of(of_classes, n=1)
    assert "<img" not in board_html(board) and "not begun" in board_html(board)
    board.take(Progress(0, 2, 16, PICTURE))
    board.take(Progress(0, 3, 16))
    shown = re.search(r'src="(data:image/png[^"]+)" alt="([^"]+)"', board_html(board))
    assert np.array_equal(np.array(png(shown[1])), PICTURE)
    assert shown[2] == "blue square, picture 1 of 1, seed 5: 3 of 16 codes"
    assert "Save PNG" not in board_html(board)


def test_a_finished_picture_is_the_file_that_is_saved(of_classes):
    page = board_html(drawn(of_classes))
    names = re.findall(r'download="([^"]+)"', page)
    assert names == ["tiny-class-blue-square-5.png", "tiny-class-blue-square-6.png"]
    image = png(re.findall(r'src="([^"]+)"', page)[1])
    assert np.array_equal(np.array(image), PICTURE)
    assert image.text["seed"] == "6" and image.text["class_name"] == "blue square"


def test_all_pictures_in_one_file(of_classes):
    content = re.search(r'href="data:application/zip;base64,([^"]+)"', again_html(drawn(of_classes, n=3)))[1]
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(content))) as archive:
        assert archive.namelist() == [f"tiny-class-blue-square-{seed}.png" for seed in (5, 6, 7)]
        assert Image.open(archive.open("tiny-class-blue-square-7.png")).text["seed"] == "7"
    assert "Save all" not in again_html(drawn(of_classes, n=1))


def test_words_of_people_are_no_html(of_texts):
    prompt = '<img src=x onerror="alert(1)"> ${alert(2)} {{3}}'
    board = drawn(of_texts, subject=prompt, n=1)
    for page in (board_html(board), again_html(board), note_html(prompt, "failed")):
        assert "<img src=x" not in page and 'onerror="alert' not in page
    assert html.escape(prompt) in board_html(board)


def test_file_names_suit_every_system(of_texts):
    request = Request("tiny-text", '../Über: "Katze" / 猫?\n' + "x" * 500, PLAIN, seed=3)
    name = file_name(request, of_texts, 1)
    assert name.startswith("tiny-text-über-katze-猫-xxx") and name.endswith("x-4.png") and len(name) < 90
    assert not set(name) & set('/\\:*?"<>|\n ')


def test_larger_pictures_are_previewed_small_and_saved_exactly(of_classes):
    from demo.models import with_values

    large = with_values(of_classes, {"image_size": 256, "downsample_size": 16})
    picture = np.zeros((256, 256, 3), np.uint8)
    board = board_of(large, n=1)
    board.take(Progress(0, 1, 256, picture))
    assert "data:image/jpeg" in board_html(board) and "crisp" not in board_html(board)
    board.take(Drawn(0, picture))
    assert "data:image/png" in board_html(board)


def test_seconds_in_words():
    assert [seconds(value) for value in (0.25, 3.2, 31.7, 200)] == ["0.2 s", "3 s", "32 s", "3 min"]
