"""How a stage's process ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SMOKE = Path(__file__).parents[1] / "presets" / "smoke.yaml"
SCRIPT = """
from attention_transfer.stage import Stage, run_script

import atexit
import gc
import threading
import time

from attention_transfer.errors import StudyError


def main(this: Stage) -> None:
    atexit.register(print, "handler", end="")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread", end=" "))).start()
    print("collecting" if gc.isenabled() else "not collecting", end=" ")
    END


run_script("example", main, __file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("pass", 0, ""),
        ("raise StudyError('was wrong', where='here', remedy='mend it')", 1, "error: here: was wrong"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise SystemExit(143)", 143, ""),
        ("raise ValueError('unforeseen')", 1, "ValueError: unforeseen"),
        ("raise RuntimeError('unforeseen')", 1, "RuntimeError: unforeseen"),
        ("raise MemoryError", 1, "error: example: out of memory (no room)\n  What to do: in "),
        ("__import__('torch').empty(2**60)", 1, "lower batch_size, set attention.source: cache"),
    ],
)
def test_every_end_flushes_runs_its_handlers_and_waits_for_its_threads(
    end: str, code: int, message: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("END", end))
    ended = subprocess.run(
        [sys.executable, script, "--params", SMOKE], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == "collecting thread handler"
    assert message in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("pass", 0),
        ("raise StudyError('was wrong', where='here', remedy='mend it')", 1),
        ("raise KeyboardInterrupt", 130),
        ("raise SystemExit(143)", 143),
        ("raise SystemExit", 0),
        ("raise MemoryError", 1),
        ("raise ValueError", -signal.SIGABRT),
    ],
)
def test_a_teardown_that_aborts_changes_no_exit_code(end: str, code: int, tmp_path: Path) -> None:
    """As gloo's threads may; what nobody foresaw ends as Python ends."""
    late = "import os\nclass Late:\n    def __del__(self, abort=os.abort): abort()\nlate = Late()\n"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("END", end).replace("\n\ndef main", f"\n\n{late}\n\ndef main"))
    ended = subprocess.run(
        [sys.executable, script, "--params", SMOKE], capture_output=True, cwd=tmp_path, check=False
    )
    assert ended.returncode == code, ended.stderr
