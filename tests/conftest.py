"""What concerns all tests: their order, the garbage collector, stages that start at once, and a small disk."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm_python

LONGEST = (
    "test_study.py",
    "test_study_sources.py",
    "test_faults.py",
    "test_bring_your_own.py",
)  # begun last, they would leave the other worker idle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first; the others stay in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """The module `stage`, which tests import, turns the collector off until a stage's own process begins its work."""
    gc.enable()


@pytest.fixture(scope="session")
def warm_path() -> Iterator[str]:
    """PATH for tests that start many stages: first a folder with a warm `python`, then that of the ordinary one."""
    with tempfile.TemporaryDirectory() as place, warm_python.folder(Path(place)) as folder:
        yield os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
