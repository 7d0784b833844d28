"""A tiny T5 encoder for all tests of captions."""

from pathlib import Path

import pytest

from tests.tiny_t5 import make_tiny_t5


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """A folder that holds the saved encoder ``tiny``."""
    return make_tiny_t5(tmp_path_factory.mktemp("t5"))
