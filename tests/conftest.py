"""Shared fixtures. One thread per test process: the suite runs in parallel."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import golden

torch.set_num_threads(1)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> golden.Case:
    """The golden that `golden.cases` names."""
    return golden.Case.load(request.param)
