"""Which sample comes when: an endless order of draws whose position is one number.

The global batches do not depend on the number of processes or of loader workers, nor on restarts: batch b of epoch e
is a slice of a permutation made from (seed, e) alone, and the randomness inside a sample (crops, flips) comes from a
seed of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from utils.args import num_workers
from utils.distributed import get_rank, get_world_size, read_launch
from utils.seeding import mix_seed, seeded


class Draw(NamedTuple):
    """One sample to load, and the seed of its augmentation."""

    index: int
    seed: int


class GlobalBatchSampler(Sampler[list[Draw]]):
    """Yields this rank's share of each global batch, epoch after epoch without end.

    With `accumulation` = A a global batch comes as A lists in a row. The tail of an epoch that does not fill a global
    batch is dropped, as in the established trainers.

    Args:
        length: number of samples in the data set.
        global_batch_size: samples per optimizer step, over all ranks and micro-batches.
        start: number of global batches already done.
    """

    def __init__(
        self,
        length: int,
        global_batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start: int = 0,
    ) -> None:
        if global_batch_size % (world_size * accumulation):
            raise ValueError(
                f"--global-batch-size {global_batch_size} is not a multiple of {world_size} process(es) x "
                f"{accumulation} accumulation step(s)"
            )
        if length < global_batch_size:
            raise ValueError(
                f"the data set has {length} samples, fewer than --global-batch-size {global_batch_size}; "
                f"check the data path or give a smaller batch"
            )
        self.length, self.global_batch_size, self.seed = length, global_batch_size, seed
        self.rank, self.world_size, self.accumulation, self.start = rank, world_size, accumulation, start
        self._epoch, self._permutation = -1, torch.empty(0)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return self.length // self.global_batch_size

    def global_batch(self, number: int) -> list[Draw]:
        """All draws of global batch `number`, counted from the start of training."""
        return self._draws(number, 0, self.global_batch_size)

    def _draws(self, number: int, first: int, count: int) -> list[Draw]:
        """The `count` draws of global batch `number` from its draw `first` on; no others are seeded, which is slow."""
        epoch, batch = divmod(number, self.batches_per_epoch)
        start = batch * self.global_batch_size + first
        order = self._order(epoch)[start : start + count]
        return [Draw(index, mix_seed(self.seed, epoch, index)) for index in order.tolist()]

    def _order(self, epoch: int) -> torch.Tensor:
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=generator)
        return self._permutation

    def __iter__(self) -> Iterator[list[Draw]]:
        micro = self.global_batch_size // (self.world_size * self.accumulation)
        number = self.start
        while True:
            for part in range(self.accumulation):
                yield self._draws(number, (part * self.world_size + self.rank) * micro, micro)
            number += 1


class SeededItems(Dataset):
    """Gives item `draw.index` of a data set, its random augmentation decided by `draw.seed`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> Any:
        with seeded(draw.seed):
            return self.dataset[draw.index]


class StreamPosition:
    """Where a training stands in an endless stream: a stream has no position inside an epoch, only an epoch.

    A run that continues in the middle of an epoch goes on with the next one, in that one's order.
    """

    def __init__(self, samples: Any, global_batch_size: int) -> None:
        self.samples, self.batches_per_epoch = samples, samples.total // global_batch_size
        if not self.batches_per_epoch:
            raise ValueError(
                f"the shards hold {samples.total} samples, fewer than --global-batch-size {global_batch_size}"
            )

    @property
    def start(self) -> int:
        """Number of global batches already done; setting it chooses the epoch to begin with."""
        return self._start

    @start.setter
    def start(self, batches: int) -> None:
        self._start = batches
        self.samples.set_epoch(-(-batches // self.batches_per_epoch))


def training_loader(
    dataset: Dataset, args: argparse.Namespace, device: torch.device
) -> tuple[GlobalBatchSampler | StreamPosition, DataLoader]:
    """The draws and the loader of a training command; set `sampler.start` before the loader is iterated.

    The loader's workers live as long as the training. `args` has the flags of `utils.args.add_optimizer_args`.
    """
    workers, on_gpu = num_workers(args, read_launch().local_size), device.type == "cuda"
    if isinstance(dataset, IterableDataset):
        stream = StreamPosition(dataset, args.global_batch_size)
        micro = args.global_batch_size // (get_world_size() * args.gradient_accumulation_steps)
        return stream, DataLoader(dataset, batch_size=micro, num_workers=workers, pin_memory=on_gpu)
    sampler = GlobalBatchSampler(
        len(dataset),  # type: ignore[arg-type]
        args.global_batch_size,
        seed=args.global_seed,
        rank=get_rank(),
        world_size=get_world_size(),
        accumulation=args.gradient_accumulation_steps,
    )
    items = SeededItems(dataset)
    return sampler, DataLoader(items, batch_sampler=sampler, num_workers=workers, pin_memory=on_gpu)
