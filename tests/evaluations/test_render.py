"""The driver that turns numbered pictures into a folder and an npz."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.render import Drawn, beside, picture_path, read_notes, render, write_npz

SETTINGS = {"what": "squares"}


def square(index: int) -> np.ndarray:
    """Picture number `index`: random pixels made of the number alone."""
    return np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)


class Painter:
    """Draws squares and remembers the batches it was asked for; cannot draw more than `limit` at once."""

    def __init__(self, limit: int = 1000) -> None:
        self.batches, self.limit = [], limit

    def __call__(self, indices: list[int]) -> Drawn:
        self.batches.append(indices)
        if len(indices) > self.limit:
            raise torch.OutOfMemoryError("too many")
        pictures = torch.from_numpy(np.stack([square(i) for i in indices]))
        return Drawn(pictures, [{"index": i, "name": f"square {i}"} for i in indices])


def test_folder_and_npz_hold_exactly_the_pictures(tmp_path):
    folder = render(Painter(), 7, tmp_path / "cfg-1.5", batch_size=3, settings=SETTINGS)
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(7)]
    with np.load(tmp_path / "cfg-1.5.npz") as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], np.stack([square(i) for i in range(7)]))
    np.testing.assert_array_equal(np.asarray(Image.open(picture_path(folder, 4))), square(4))
    assert list(read_notes(folder, 2)) == [{"index": "0", "name": "square 0"}, {"index": "1", "name": "square 1"}]
    assert json.loads(beside(folder, ".json").read_text()) == SETTINGS


def test_a_restart_draws_what_is_missing_and_gives_the_same_bytes(tmp_path):
    whole = render(Painter(), 9, tmp_path / "whole", batch_size=4, settings=SETTINGS)
    again = render(Painter(), 9, tmp_path / "again", batch_size=2, settings=SETTINGS)
    for index in (1, 5, 6):
        picture_path(again, index).unlink()
    painter = Painter()
    render(painter, 9, again, batch_size=4, settings=SETTINGS)
    assert painter.batches == [[1, 5, 6]]
    assert beside(whole, ".npz").read_bytes() == beside(again, ".npz").read_bytes()


def test_fewer_pictures_than_are_there_take_the_first(tmp_path):
    folder = render(Painter(), 5, tmp_path / "a", batch_size=5, settings=SETTINGS)
    painter = Painter()
    render(painter, 3, folder, batch_size=5, settings=SETTINGS)
    assert painter.batches == []
    with np.load(beside(folder, ".npz")) as file:
        np.testing.assert_array_equal(file["arr_0"], np.stack([square(i) for i in range(3)]))


def test_out_of_memory_halves_the_batch(tmp_path, capsys):
    painter = Painter(limit=2)
    render(painter, 7, tmp_path / "a", batch_size=7, settings=SETTINGS)
    assert [len(batch) for batch in painter.batches] == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "batches of 3" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        render(Painter(limit=0), 1, tmp_path / "b", batch_size=4, settings=SETTINGS)


def test_pictures_of_other_settings_are_refused(tmp_path):
    folder = render(Painter(), 2, tmp_path / "a", batch_size=2, settings=SETTINGS)
    with pytest.raises(ValueError, match="what = squares, now it is circles"):
        render(Painter(), 3, folder, batch_size=2, settings={"what": "circles"})
    beside(folder, ".json").unlink()
    with pytest.raises(ValueError, match=r"a\.json is missing"):
        render(Painter(), 3, folder, batch_size=2, settings=SETTINGS)


def test_random_order_is_a_permutation_made_of_the_seed(tmp_path):
    folder = render(Painter(), 20, tmp_path / "a", batch_size=20, settings=SETTINGS, npz=False)
    assert not beside(folder, ".npz").exists()
    with np.load(write_npz(folder, 20, order_seed=1)) as file:
        first = file["arr_0"]
    with np.load(write_npz(folder, 20, order_seed=1)) as file:
        np.testing.assert_array_equal(file["arr_0"], first)
    plain = np.stack([square(i) for i in range(20)])
    assert not (first == plain).all()
    np.testing.assert_array_equal(np.sort(first.reshape(20, -1), axis=0), np.sort(plain.reshape(20, -1), axis=0))


def test_a_broken_picture_is_named(tmp_path):
    folder = render(Painter(), 3, tmp_path / "a", batch_size=3, settings=SETTINGS)
    picture_path(folder, 2).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000002\.png"):
        write_npz(folder, 3)
