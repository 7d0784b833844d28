"""The editing command, and what it shares with the one that draws from nothing: grids, files, short memory."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.sample import edit_c2i, editing, pipeline, sample_c2i
from autoregressive.sample.classes import ClassNames
from autoregressive.sample.painter import Painter, class_subjects
from tests.autoregressive.sample.tiny import tiny_models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "input.png")
    return tmp_path / "input.png"


def call(command, *flags):
    command.main(command.parser().parse_args([str(flag) for flag in flags]))


def tiles(path, count, columns=4):
    """The 16-pixel pictures of a grid."""
    grid = np.asarray(Image.open(path)).astype(int)
    places = [(2 + 18 * (i // columns), 2 + 18 * (i % columns)) for i in range(count)]
    return [grid[top : top + 16, left : left + 16] for top, left in places]


def test_before_and_after_stand_in_one_picture(tiny, picture, tmp_path, capsys):
    flags = [*tiny, "--input", picture, "--class-labels", 2, 0, "--images-per-class", 2, "--paste"]
    call(edit_c2i, *flags, "--box", 8, 8, 16, 16, "--output", tmp_path / "edited.png")
    assert "4 of 16 cells are drawn anew" in capsys.readouterr().out
    original, marked, _, *edits = tiles(tmp_path / "edited.png", 7)
    crop = np.asarray(Image.open(picture))[:, 2:18]
    assert abs(original - crop).max() <= 1
    assert (marked == original)[:8].all() and (marked != original)[8:, 8:].any()
    for edit in edits:
        assert (edit[:8] == original[:8]).all() and (edit[:, :8] == original[:, :8]).all()
        assert (edit[8:, 8:] != original[8:, 8:]).any()
    assert any((edit != edits[0]).any() for edit in edits)
    text = Image.open(tmp_path / "edited.png").text
    assert json.loads(text["cells"]) == [10, 11, 14, 15] and json.loads(text["class_ids"]) == [2, 2, 0, 0]


def test_everything_but_a_box_and_the_rest_and_a_shift(tiny, picture, tmp_path, capsys):
    flags = [*tiny, "--input", picture, "--class-labels", 1, "--output", tmp_path / "edited.png"]
    choices = {8: ["--box", 0, 0, 16, 8, "--invert"], 11: ["--cells", 5, "--redraw-rest"], 4: ["--shift", 0, -1],
               16: ["--mask", picture], 2: ["--random-share", 0.125]}  # fmt: skip
    for count, choice in choices.items():
        call(edit_c2i, *flags, *choice)
        assert f"{count} of 16 cells are drawn anew" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing is chosen"):
        call(edit_c2i, *flags)
    with pytest.raises(ValueError, match="cannot read the image"):
        call(edit_c2i, *tiny, "--input", tmp_path / "absent.png", "--class-labels", 1, "--cells", 1)


def test_editing_everything_is_drawing(tiny, picture, tmp_path):
    same = [*tiny, "--class-labels", 2, 1, "--seed", 9]
    call(edit_c2i, *same, "--input", picture, "--random-share", 1, "--output-dir", tmp_path / "edited")
    call(sample_c2i, *same, "--output-dir", tmp_path / "drawn")
    for name in ("000000-2.png", "000001-1.png"):
        np.testing.assert_array_equal(Image.open(tmp_path / "edited" / name), Image.open(tmp_path / "drawn" / name))
    assert not (tmp_path / "sample_c2i.png").exists()


def test_pictures_are_not_gathered_when_no_grid_is_wanted(tiny, tmp_path):
    sample = sample_c2i.parser().parse_args([*map(str, tiny), "--batch-size", "2", "--output-dir", str(tmp_path)])
    draw = lambda numbers, on_token: torch.zeros(len(numbers), 4)  # noqa: E731
    painter = Painter(
        sample, class_subjects([0, 1, 2], ClassNames(3)), draw, lambda codes: torch.zeros(len(codes), 3, 4, 4), 4
    )
    assert painter.paint().shape == (0, 3, 4, 4) and len(list(tmp_path.iterdir())) == 3
    sample.output = str(tmp_path / "grid.png")
    assert painter.paint().shape == (3, 3, 4, 4)


@pytest.mark.parametrize("command", ["sample", "edit"])
def test_a_batch_too_large_for_the_memory_is_halved(command, tiny, picture, tmp_path, monkeypatch, capsys):
    flags = [*tiny, "--class-labels", 0, 1, 2, 0, 1]
    if command == "edit":
        flags += ["--input", picture, "--cells", 3, 9]
    started = {"sample": sample_c2i, "edit": edit_c2i}[command]
    call(started, *flags, "--output", tmp_path / "whole.png")
    module = {"sample": pipeline, "edit": editing}[command]
    real = module.generate

    def scarce(gpt, labels, *rest, **options):
        if len(labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(gpt, labels, *rest, **options)

    monkeypatch.setattr(module, "generate", scarce)
    capsys.readouterr()
    call(started, *flags, "--output", tmp_path / "halved.png")
    assert "out of memory at a batch of 5, goes on with 2" in capsys.readouterr().out
    np.testing.assert_array_equal(Image.open(tmp_path / "halved.png"), Image.open(tmp_path / "whole.png"))
