"""What several DVCs print, on one terminal or in one log."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from typing import TextIO

PROGRESS = re.compile(r"^(?P<what>.*?):?\s*(?P<share>\d+)%\|.*?\|\s*(?P<rest>.*)$")
"""tqdm's lines, whose bar is left out: two do not fit side by side."""
SECONDS = 15.0  # between two lines of progress of one DVC, where they cannot take the place of the last
CLEAR = "\r\x1b[2K"


class Display:
    """Prints lines of several writers, each behind its number; progress in place, or now and then in a log."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.in_place = self.out.isatty()
        self.lock = threading.Lock()
        self.status: dict[int, str] = {}
        self.last: dict[int, float] = {}

    def line(self, number: int, text: str) -> None:
        """Shows a line that a writer has printed."""
        found = PROGRESS.match(text.rstrip())
        with self.lock:
            if found is None:
                self.status.pop(number, None)
                self._write(f"[{number}] {text.rstrip()}")
                return
            short = f"[{number}] {found['what']} {found['share']}% {found['rest']}"
            if self.in_place:
                self.status[number] = short
                self._draw()
            elif time.monotonic() - self.last.get(number, -SECONDS) >= SECONDS or found["share"] == "100":
                self.last[number] = time.monotonic()
                self._write(short)

    def say(self, text: str) -> None:
        """Shows a line of one's own."""
        with self.lock:
            self._write(text)

    def _write(self, text: str) -> None:
        self.out.write(f"{CLEAR if self.in_place and self.status else ''}{text}\n")
        if self.in_place and self.status:
            self._draw()
        self.out.flush()

    def _draw(self) -> None:
        columns = shutil.get_terminal_size().columns
        self.out.write(
            CLEAR + "   ".join(self.status[number] for number in sorted(self.status))[: columns - 1]
        )
        self.out.flush()
