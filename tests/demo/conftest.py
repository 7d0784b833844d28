"""Cards of tiny models."""

import pytest

from tests.autoregressive.serve.tiny import tiny_cards


@pytest.fixture(scope="session")
def cards(tmp_path_factory):
    """ "tiny-class" and "tiny-text"."""
    return tiny_cards(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="session")
def of_classes(cards):
    """The card of "tiny-class"."""
    return cards[0]


@pytest.fixture(scope="session")
def of_texts(cards):
    """The card of "tiny-text"."""
    return cards[1]
