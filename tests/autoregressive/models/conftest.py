"""Goldens of full-size models are slow."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "[gpt_b_" in item.nodeid:
            item.add_marker(pytest.mark.slow)
