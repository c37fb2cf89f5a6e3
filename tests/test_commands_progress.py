"""What several writers are at: calm lines in a log, a table in a real terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tqdm import tqdm

from attention_transfer.commands import progress
from attention_transfer.commands.progress import Display, duration, short

ROOT = Path(__file__).parents[1]
BAR = "train-copy-0:  40%|████      | 320/800 [00:28<00:35, 13.14step/s, task_loss=0.9]\n"
OF_DVC = (
    "Running stage 'train@copy-0':\n",
    "> exec python pipeline/train.py --run copy --seed 0\n",
    "Updating lock file 'dvc.lock'\n",
    "\n",
    "Stage 'split' didn't change, skipping\n",
    "Use `dvc push` to send your updates to remote storage.\n",
)


def test_a_log_has_each_stage_what_matters_and_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display(out := io.StringIO()) as display:
        display.begin(1, "studies/full/qkv/dvc.yaml:train@copy-0")
        for line in OF_DVC:
            display.line(1, line)
        for second in range(40):
            now[0] += 1
            display.line(1, BAR.replace("40%", f"{second}%"))
        display.line(2, BAR)
        display.line(1, BAR.replace("40%", "100%"))
        display.line(1, "error: the loss became nan\n")
        display.end(1, finished=True)
        display.end(2, finished=True)  # has not begun any
        display.overall("3 of 9 stages")
    bar = "320/800 [00:28<00:35, 13.14step/s, task_loss=0.9]"
    assert out.getvalue().splitlines() == [
        "[1] full/qkv:train@copy-0 begins",
        *(f"[1] train-copy-0 {share}% {bar}" for share in (0, 15, 30)),
        f"[2] train-copy-0 40% {bar}",
        f"[1] train-copy-0 100% {bar}",
        "[1] error: the loss became nan",
        "[1] full/qkv:train@copy-0: 00:40",
        "3 of 9 stages",
    ]


def test_a_stage_that_is_cut_off_has_no_time() -> None:
    display = Display(out := io.StringIO())
    display.begin(1, "train@a-0")
    display.end(1, finished=False)
    assert out.getvalue() == "[1] train@a-0 begins\n"


def test_names_and_times_are_short() -> None:
    assert short("studies/smoke/dvc.yaml:train@copy-0") == "smoke:train@copy-0"
    assert short("train@copy-0") == short("dvc.yaml:train@copy-0") == "train@copy-0"
    assert [duration(seconds) for seconds in (0.4, 61, 3600, 36061)] == [
        "00:00",
        "01:01",
        "1:00:00",
        "10:01:01",
    ]


def test_what_tqdm_prints_is_progress() -> None:
    """As the stages use it, into a pipe, whose carriage returns end lines."""
    out = io.StringIO()
    with tqdm(total=5, desc="cache mae views", unit="shard", file=out, mininterval=0) as bar:
        for _ in range(5):
            bar.update()
    found = [progress.PROGRESS.match(line) for line in out.getvalue().replace("\r", "\n").split("\n") if line]
    assert found
    assert all(found)
    assert {match["what"] for match in found if match} == {"cache mae views"}
    assert [match["done"] for match in found if match][-1] == "5/5"
    assert all(match["speed"].endswith(("shard/s", "s/shard")) for match in found if match)
    assert not progress.PROGRESS.match("validation accuracy 80% | better\n".rstrip())
    assert Display().out is sys.stdout


# A stage's work in a real terminal: a line of its own above, the table below, and nothing of it at the end.
PROGRAM = f"""
import time
from attention_transfer.commands.progress import Display
with Display() as display:
    display.begin(1, "train@copy-0")
    display.begin(2, "studies/full/qkv/dvc.yaml:predict@copy-1")
    display.line(1, {BAR!r})
    for line in {OF_DVC!r}:
        display.line(1, line)
    display.line(2, "something [bold]unusual[/bold]")
    display.overall("3 of 9 stages: about 2 min to go; then 4 train")
    time.sleep(1.2)
    display.end(1, finished=True)
"""


def in_terminal(program: str, columns: int, term: str = "xterm") -> str:
    """What a program writes to a pseudo-terminal."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    running = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment | {"TERM": term, "PYTHONPATH": str(ROOT / "src")},
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:  # what Linux says at the end
            break
        if not part:
            break
        written += part
    os.close(controller)
    assert running.wait(30) == 0, written.decode()
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that are left on the screen: of what rich writes, as far as it moves upwards and clears lines."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r\n|\r|\n|[^\x1b\r\n]+", written):
        if part == "\x1b[2K":
            lines[row] = ""
        elif part in ("\x1b[1A", "\x1b[A"):
            row -= 1
        elif part in ("\r\n", "\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part != "\r" and not part.startswith("\x1b"):
            lines[row] += part
    return [line.rstrip() for line in lines]


def test_a_terminal_has_a_table_of_what_is_at_work_below_the_lines() -> None:
    written = in_terminal(PROGRAM, columns=90)
    foot = "then 4 train"
    last = written.rindex(foot, 0, written.rindex("train@copy-0: 0"))
    drawn = screen(written[: last + len(foot)])
    text = "\n".join(drawn)
    assert "[2] something [bold]unusual[/bold]" in text
    [heading] = [line for line in drawn if line.startswith("stage")]
    assert heading.split() == ["stage", "done", "speed", "time", "left"]
    [row] = [line for line in drawn if line.startswith("train@copy-0")]
    assert re.search(r"━.* 320/800 +13\.14step/s +00:01 +00:35$", row)
    [row] = [line for line in drawn if line.startswith("full/qkv:predict@copy-1")]
    assert row.endswith("00:01")
    assert "3 of 9 stages: about 2 min to go; then 4 train" in text
    for routine in ("Running stage", "exec python", "lock file", "didn't change", "dvc push"):
        assert routine not in written


@pytest.mark.parametrize("columns", [90, 40])
def test_a_terminal_is_left_as_it_was(columns: int) -> None:
    """Nothing of the table is left behind, also where it had to be cut."""
    written = in_terminal(PROGRAM, columns)
    assert (
        written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1
    )  # the cursor: hidden, and shown again
    assert [line for line in screen(written) if line] == [
        "[2] something [bold]unusual[/bold]",
        "[1] train@copy-0: 00:01",
        "3 of 9 stages: about 2 min to go; then 4 train",
    ]


def test_a_terminal_that_cannot_move_its_cursor_has_a_log() -> None:
    written = in_terminal(PROGRAM, columns=90, term="dumb")
    assert "\x1b" not in written
    assert "[1] train@copy-0 begins" in written
