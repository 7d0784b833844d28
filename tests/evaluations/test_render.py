"""The driver that turns numbered pictures into a folder and an npz."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluations import render as render_module
from evaluations.render import (
    Drawn,
    SharedQueue,
    beside,
    picture_path,
    read_notes,
    render,
    split_evenly,
    write_npz,
)

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
    assert "out of memory at a batch of 7, goes on with 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a batch of one: too many"):
        render(Painter(limit=0), 1, tmp_path / "b", batch_size=4, settings=SETTINGS)


def test_pictures_of_other_settings_are_refused(tmp_path):
    folder = render(Painter(), 2, tmp_path / "a", batch_size=2, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"a holds pictures made with another what \(squares, now circles\)"):
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


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    folder = render(Painter(), 2, tmp_path / "a", batch_size=2, settings=SETTINGS)
    (folder / ".000007.png.123.abc.tmp").write_bytes(b"half")
    render(Painter(), 3, folder, batch_size=2, settings=SETTINGS)
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(3)]


@given(count=st.integers(0, 200), batch_size=st.integers(1, 20), workers=st.integers(1, 9))
def test_split_evenly_gives_all_items_once_in_order_and_every_worker_as_much(count, batch_size, workers):
    items = list(range(100, 100 + count))
    batches = split_evenly(items, batch_size, workers)
    assert [i for batch in batches for i in batch] == items
    sizes = [len(batch) for batch in batches]
    full = count // (batch_size * workers) * workers
    assert sizes[:full] == [batch_size] * full
    rest = sizes[full:]
    assert len(rest) == min(workers, count - full * batch_size)
    assert max(rest, default=0) - min(rest, default=0) <= 1


def test_a_queue_gives_each_piece_to_one_process_and_a_slow_one_gets_fewer(monkeypatch):
    """Three processes stand for threads here: they share a store, as those of a group do."""
    store, taken = torch.distributed.HashStore(), {0: [], 1: [], 2: []}
    monkeypatch.setattr(render_module, "get_world_size", lambda: 3)
    monkeypatch.setattr(render_module, "group_store", lambda: store)
    work, heard = [[i] for i in range(40)], {0: [], 1: [], 2: []}
    queues = []
    for _ in range(3):
        monkeypatch.setattr(SharedQueue, "_made", 6)  # each process counts its own
        queues.append(SharedQueue())
    left: list[int] = []

    def process(rank):
        for piece in queues[rank].take(work):
            while rank == 0 and store.add("queue7/ended", 0) < 2:  # the slow one: until the others have no more to do
                time.sleep(0.01)
            taken[rank].extend(piece)
            heard[rank].append(queues[rank].finish(1))
        if rank == 0:
            time.sleep(0.5)
            assert left == []  # they wait
        queues[rank].wait(heard[rank].append)
        left.append(rank)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    threads[0].start()
    while store.add("queue7/taken", 0) == 0:  # so that the slow one has a piece
        pass
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(taken[0] + taken[1] + taken[2]) == list(range(40))
    assert len(taken[0]) == 1 and len(left) == 3
    assert [sum(counts) for counts in heard.values()] == [40, 40, 40]  # each hears of all that is finished, once
