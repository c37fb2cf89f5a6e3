"""A short run of the fault driver: the long one is recorded in docs/reliability.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_eight_kills_change_no_bit_and_leave_nothing_behind(tmp_path: Path) -> None:
    """Two in each of four stages, of a part of the smoke study; the moments are drawn from a fixed seed."""
    command = [sys.executable, "faults/kill.py", str(tmp_path), "--kills", "8", "--small", "--seed", "1"]
    ended = subprocess.run(
        [*command, "--stages", "pretrain,cache,train,predict"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert len(found["kills"]) == 8
    assert found["bit_identical"]
    assert found["files"] > 20
    assert found["left_behind"] == []
