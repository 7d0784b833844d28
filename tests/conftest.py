"""Shared fixtures. One thread per test process: the suite runs in parallel."""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import golden

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """A run takes the project's logger for itself; give it back, so that tests do not depend on their order."""
    yield
    logger = logging.getLogger("llamagen")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


@pytest.fixture
def case(request: pytest.FixtureRequest) -> golden.Case:
    """The golden that `golden.cases` names."""
    return golden.Case.load(request.param)
