"""Lines of several writers: every line once, progress in place or now and then."""

from __future__ import annotations

import io
import sys

import pytest
from tqdm import tqdm

from attention_transfer.commands import progress
from attention_transfer.commands.progress import CLEAR, Display

BAR = "train-copy-0:  40%|████      | 320/800 [00:28<00:35, 13.14step/s, task_loss=0.9]\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_every_line_and_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = Display(out := io.StringIO())
    for second in range(40):
        now[0] += 1
        display.line(1, BAR.replace("40%", f"{second}%"))
    display.line(2, BAR)
    display.line(1, BAR.replace("40%", "100%"))
    display.line(1, "Updating lock file\n")
    display.say("3 of 9 stages")
    lines = out.getvalue().splitlines()
    assert [line.split()[2] for line in lines[:3]] == ["0%", "15%", "30%"]
    assert lines[3] == "[2] train-copy-0 40% 320/800 [00:28<00:35, 13.14step/s, task_loss=0.9]"
    assert lines[4].startswith("[1] train-copy-0 100%")
    assert lines[5:] == ["[1] Updating lock file", "3 of 9 stages"]


def test_a_terminal_has_one_line_of_progress_below_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    display = Display(out := Terminal())
    display.line(1, BAR)
    display.line(2, BAR.replace("copy", "distill"))
    assert out.getvalue().count("\n") == 0
    last = out.getvalue().rpartition(CLEAR)[2]
    assert last.startswith("[1] train-copy-0 40% 320/800")
    assert len(last) == 59
    display.line(2, "Updating lock file\n")  # that bar is over
    above, _, below = out.getvalue().rpartition("\n")
    assert above.endswith(f"{CLEAR}[2] Updating lock file")
    assert below.startswith(f"{CLEAR}[1] train-copy-0 40%")
    assert "[2]" not in below


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
    assert not progress.PROGRESS.match("validation accuracy 80% | better\n".rstrip())
    assert Display().out is sys.stdout
