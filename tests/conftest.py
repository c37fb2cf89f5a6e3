"""What concerns all tests: their order."""

from __future__ import annotations

import pytest

LONGEST = "test_study.py"  # half of the time of all: begun last, it would leave the other worker idle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first; the others stay in their order."""
    items.sort(key=lambda item: item.path.name != LONGEST)
