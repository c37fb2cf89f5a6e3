"""What concerns all tests: their order, and the garbage collector."""

from __future__ import annotations

import gc

import pytest

LONGEST = (
    "test_study.py",
    "test_study_sources.py",
    "test_faults.py",
)  # begun last, they would leave the other worker idle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first; the others stay in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """The module `stage`, which tests import, turns the collector off until a stage's own process begins its work."""
    gc.enable()
