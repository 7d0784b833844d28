"""Which pictures count, and how they are cropped."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluations.t2i.pictures import (
    SquarePictures,
    centre_square,
    generated_pictures,
    natural_key,
    reference_pictures,
)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures named 0 to 11 of grey 10 * i, the captions of ten, and two fillers."""
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def list_pictures(folder, count):
    lines = [json.dumps({"text": f"caption {i}", "image_path": f"elsewhere/images/{i}.png"}) for i in range(count)]
    (folder / "result.jsonl").write_text("\n".join(lines) + "\n")


def test_fillers_do_not_count(folder):
    list_pictures(folder, 10)
    found = generated_pictures(folder, 30000)
    assert [picture.path.name for picture in found] == [f"{i}.png" for i in range(10)]
    assert found[3].caption == "caption 3" and found[3].path == folder / "images/3.png"


def test_a_picture_that_is_listed_must_be_there(folder):
    list_pictures(folder, 10)
    (folder / "images/4.png").unlink()
    with pytest.raises(ValueError, match=r"4\.png is missing.*--how_many 4"):
        generated_pictures(folder, 30000)
    # the established sampler lists prompts for which it made no picture
    assert len(generated_pictures(folder, 4)) == 9


def test_a_list_of_which_nothing_is_there(folder):
    (folder / "result.jsonl").write_text('{"text": "a", "image_path": "x.png"}\n')
    with pytest.raises(ValueError, match="missing"):
        generated_pictures(folder, 1)
    with pytest.raises(ValueError, match="none of the pictures"):
        generated_pictures(folder, 0)


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', "3"])
def test_lines_that_are_no_entries(folder, line):
    (folder / "result.jsonl").write_text(f'{{"text": "a", "image_path": "0.png"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2: expected"):
        generated_pictures(folder, 1)


def test_captions_may_hold_other_line_ends(folder):
    text = "one\u2028two\x85three"
    (folder / "result.jsonl").write_text(json.dumps({"text": text, "image_path": "0.png"}, ensure_ascii=False))
    assert generated_pictures(folder, 1)[0].caption == text


def test_without_a_list_line_i_is_of_picture_i_in_natural_order(folder):
    (folder / "captions.txt").write_text("".join(f"caption {i}\n" for i in range(12)))
    found = generated_pictures(folder, 30000)
    assert [picture.path.name for picture in found][8:] == ["8.png", "9.png", "10.png", "11.png"]
    assert found[10].caption == "caption 10"


def test_more_pictures_than_captions_is_an_error(folder):
    (folder / "captions.txt").write_text("".join(f"caption {i}\n" for i in range(10)))
    with pytest.raises(ValueError, match=r"has 12 PNGs, .* has 10 lines"):
        generated_pictures(folder, 30000)


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="sample_t2i_ddp"):
        generated_pictures(tmp_path, 1)
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither result\.jsonl nor captions\.txt"):
        generated_pictures(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="val2014"):
        reference_pictures(tmp_path, "coco2014", "train")
    (tmp_path / "val2014").mkdir()
    with pytest.raises(ValueError, match="no images"):
        reference_pictures(tmp_path, "coco2014", "train")


def test_references_lie_in_sub_folders_too(tmp_path):
    for name in ("train/b/1.JPEG", "train/a/2.jpg", "train/.hidden.png", "train/notes.txt", "other/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in reference_pictures(tmp_path, "imagenet2012", "train")] == ["2.jpg", "1.JPEG"]


def test_natural_order(tmp_path):
    names = ["b10.png", "b9.png", "a2x10.png", "a2x9.png", "a10.png", "7.png"]
    ordered = sorted((tmp_path / name for name in names), key=natural_key)
    assert [p.name for p in ordered] == ["7.png", "a2x9.png", "a2x10.png", "a10.png", "b9.png", "b10.png"]


def test_the_middle_square_is_taken_and_no_level_is_lost():
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2:6] = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    assert np.array_equal(np.array(centre_square(Image.fromarray(pixels), 4)), pixels[:, 2:6])
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert np.array_equal(np.array(centre_square(levels, 16)), np.array(levels))


def test_pictures_are_read_as_uint8(folder):
    pictures = SquarePictures([folder / "images/3.png"], 4)
    assert pictures[0].shape == (4, 4, 3) and pictures[0].unique().tolist() == [30]
