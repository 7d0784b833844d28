"""Random numbers that are a function of what they are for, not of what was drawn before."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def mix_seed(*numbers: int) -> int:
    """A well-mixed 63-bit seed from several non-negative integers; ValueError for a negative one."""
    if min(numbers) < 0:
        raise ValueError(f"a seed is 0 or more, not {min(numbers)}")
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's generators on every device for one training step of one rank."""
    torch.manual_seed(mix_seed(seed, step, rank))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the CPU generators of torch and Python from `seed` inside the block, and restore them after it."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's generator as well
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
