"""Uploads are read with care, and paint becomes cells."""

import io

import numpy as np
import pytest
from PIL import Image

from autoregressive.serve.requests import BadRequest
from demo.retouch import CANVAS, canvas_of, edit_of, marked_html, painted_cells, read_upload

PICTURE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)


def painting(*boxes, size=512):
    layer = np.zeros((size, size, 4), np.uint8)
    for left, top, right, bottom in boxes:
        layer[top:bottom, left:right] = (1, 2, 3, 190)
    return {"background": None, "layers": [layer], "composite": None}


def saved(image, tmp_path, **options):
    path = tmp_path / "picture.png"
    image.save(path, **options)
    return path


def test_the_centre_of_a_picture(tmp_path):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 16:48] = (10, 200, 30)
    assert (read_upload(saved(Image.fromarray(pixels), tmp_path), 16) == (10, 200, 30)).all()


def test_photos_are_upright_and_see_through_pictures_are_on_white(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255  # bright on the left: on top, when it is upright
    upright = read_upload(saved(Image.fromarray(pixels), tmp_path, exif=turned), 16)
    assert (upright[:8] == 255).all() and (upright[8:] == 0).all()
    assert (read_upload(saved(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), tmp_path), 16) == 255).all()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"0" * 50, b"GIF89a\xff\xff\xff\xff"])
def test_what_is_no_picture(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match="no picture that can be read"):
        read_upload(path, 16)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_half_a_picture_and_an_endless_one(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, format="PNG")
    path = tmp_path / "x.png"
    path.write_bytes(whole.getvalue()[:3000])
    with pytest.raises(BadRequest, match="no picture that can be read"):
        read_upload(path, 16)
    with pytest.raises(BadRequest, match="too large"):
        read_upload(saved(Image.new("1", (10_000, 10_000)), tmp_path), 16)
    with pytest.raises(BadRequest, match="No picture has arrived"):
        read_upload(None, 16)


def test_paint_chooses_the_cells_that_it_touches():
    chosen = painted_cells(painting((130, 0, 250, 100), (511, 511, 512, 512)), 4)
    assert chosen.dtype == bool and chosen.nonzero()[0].tolist() == [1, 15]
    assert painted_cells(painting((127, 0, 130, 2), size=256), 2).nonzero()[0].tolist() == [0, 1]
    assert not painted_cells(painting(), 4).any() and not painted_cells(None, 4).any()


def test_faint_edges_of_the_brush_do_not_count():
    faint = painting((0, 0, 512, 512))
    faint["layers"][0][..., 3] = 60
    assert not painted_cells(faint, 4).any()


def test_an_edit_fits_the_model(of_classes):
    edit = edit_of(np.zeros((64, 64, 3), np.uint8), painting((130, 130, 140, 140)), False, of_classes)
    edit.check(of_classes)
    assert edit.mask.nonzero()[0].tolist() == [5]
    rest = edit_of(PICTURE, painting((130, 130, 140, 140)), True, of_classes)
    assert rest.mask.nonzero()[0].tolist() == list(range(5, 16))
    assert np.array_equal(rest.picture, PICTURE)  # one of the model's size stays as it is, to the byte


def test_what_is_missing_is_told(of_classes):
    with pytest.raises(BadRequest, match="Choose a picture first"):
        edit_of(None, painting((0, 0, 9, 9)), False, of_classes)
    with pytest.raises(BadRequest, match="Nothing is painted"):
        edit_of(PICTURE, painting(), False, of_classes)


def test_pictures_are_large_enough_to_paint_on():
    canvas = canvas_of(PICTURE)
    assert canvas.shape == (CANVAS, CANVAS, 3) and np.array_equal(canvas[::32, ::32], PICTURE)
    assert canvas_of(np.zeros((384, 384, 3), np.uint8)).shape == (768, 768, 3)


def test_chosen_cells_are_shown(of_classes):
    page = marked_html(edit_of(PICTURE, painting((0, 0, 200, 100)), False, of_classes))
    assert "2 of 16 cells will be drawn anew" in page and 'data-cells="2"' in page
