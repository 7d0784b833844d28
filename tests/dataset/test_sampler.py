"""The order of draws: independent of ranks, workers and restarts."""

import argparse
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dataset import sampler as sampler_module
from dataset.sampler import Draw, GlobalBatchSampler, SeededItems, StreamPosition, training_loader


def first_batches(sampler: GlobalBatchSampler, count: int) -> list[list[Draw]]:
    return list(itertools.islice(sampler, count))


@given(
    length=st.integers(8, 40), micro=st.integers(1, 2), world=st.sampled_from([1, 2, 4]),
    parts=st.sampled_from([1, 2]), seed=st.integers(0, 5), start=st.integers(0, 9),
)  # fmt: skip
def test_ranks_and_micro_batches_make_up_the_global_batch(length, micro, world, parts, seed, start):
    size = 8 * micro if 8 * micro <= length else 8
    alone = first_batches(GlobalBatchSampler(length, size, seed=seed), start + 3)
    split = [
        first_batches(
            GlobalBatchSampler(length, size, seed=seed, rank=r, world_size=world, accumulation=parts, start=start),
            3 * parts,
        )
        for r in range(world)
    ]
    for b in range(3):
        together = [draw for part in range(parts) for r in range(world) for draw in split[r][b * parts + part]]
        assert together == alone[start + b]
    assert {len(draws) for of_rank in split for draws in of_rank} == {size // (world * parts)}  # all as many


def test_the_draws_and_seeds_are_those_of_earlier_trainings():
    sampler = GlobalBatchSampler(10, 4, seed=3, rank=1, world_size=2, start=3)
    assert first_batches(sampler, 2) == [
        [(8, 34415576561559870), (5, 818463220519293219)],
        [(6, 4953041256467392649), (5, 8457714677105321250)],
    ]


def test_a_process_seeds_its_own_draws_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(sampler_module, "mix_seed", lambda *numbers: seeded.append(numbers) or 0)
    draws = first_batches(GlobalBatchSampler(40, 16, seed=3, rank=2, world_size=4, accumulation=2), 4)
    assert [numbers[2] for numbers in seeded if len(numbers) == 3] == [draw.index for part in draws for draw in part]
    assert len(seeded) == 4 * 2 + 1  # and the order of the epoch


class Stream(IterableDataset):
    """Ten samples without end, and the epoch that it is told to begin with."""

    total, epoch = 10, None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return itertools.cycle(range(self.total))


@pytest.mark.parametrize(("done", "epoch"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2)])
def test_a_stream_that_stopped_inside_an_epoch_goes_on_with_the_next(done, epoch):
    stream = Stream()
    position = StreamPosition(stream, global_batch_size=3)
    assert position.batches_per_epoch == 3
    position.start = done
    assert (position.start, stream.epoch) == (done, epoch)


def test_a_stream_shorter_than_a_batch_is_refused():
    assert StreamPosition(Stream(), 10).batches_per_epoch == 1
    with pytest.raises(ValueError, match="hold 10 samples, fewer than --global-batch-size 11"):
        StreamPosition(Stream(), 11)


def test_a_streams_loader_gives_the_share_of_one_process_and_one_accumulation_step(monkeypatch):
    monkeypatch.setattr(sampler_module, "get_world_size", lambda: 4)
    args = argparse.Namespace(global_batch_size=24, gradient_accumulation_steps=2, num_workers=0)
    monkeypatch.setattr(Stream, "total", 50)
    position, loader = training_loader(Stream(), args, torch.device("cpu"))
    assert position.batches_per_epoch == 2
    assert next(iter(loader)).tolist() == [0, 1, 2]


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order():
    sampler = GlobalBatchSampler(12, 4, seed=3)
    assert [sampler.global_batch(number) for number in range(6)] == first_batches(sampler, 6)
    draws = list(itertools.chain.from_iterable(first_batches(sampler, 6)))
    epochs = [[d.index for d in draws[:12]], [d.index for d in draws[12:]]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert {d.seed for d in draws[:12]}.isdisjoint({d.seed for d in draws[12:]})  # another crop in every epoch


class Noise(Dataset):
    """Draws from both generators that readers use."""

    def __getitem__(self, index):
        return index, torch.rand(()), random.random()


@pytest.mark.parametrize("workers", [0, 2])
def test_randomness_inside_a_sample_comes_from_its_draw_alone(workers):
    torch.manual_seed(1)
    sampler = GlobalBatchSampler(6, 3)
    loader = DataLoader(SeededItems(Noise()), batch_sampler=sampler, num_workers=workers)
    got = [[t.tolist() for t in batch] for batch in itertools.islice(loader, 2)]
    expected = [SeededItems(Noise())[draw] for draw in itertools.chain.from_iterable(first_batches(sampler, 2))]
    flat = [list(map(float, item)) for batch in got for item in zip(*batch)]
    assert flat == [[float(i), float(a), float(b)] for i, a, b in expected]


def test_the_generators_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(()), random.random()
    torch.manual_seed(5)
    random.seed(5)
    SeededItems(Noise())[Draw(0, 123)]
    assert (torch.rand(()), random.random()) == expected


@pytest.mark.parametrize(
    ("length", "batch", "world", "message"), [(10, 5, 2, "not a multiple of 2 process"), (3, 4, 1, "3 samples, fewer")]
)
def test_batches_that_cannot_be(length, batch, world, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(length, batch, world_size=world)
