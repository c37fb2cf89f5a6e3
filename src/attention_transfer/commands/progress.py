"""What several DVCs are at: a table that lives at the foot of a terminal, or calm lines in a log."""

from __future__ import annotations

import re
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:  # a log does without
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

PROGRESS = re.compile(
    r"^(?P<what>.*?):?\s*(?P<share>\d+)%\|.*?\|\s*(?P<rest>(?P<done>\S+)\s*"
    r"\[[^<\]]*<(?P<left>[^,\]]*),\s*(?P<speed>[^,\]]*).*)$"
)
"""tqdm's lines; in a log without the bar."""
ROUTINE = re.compile(
    r"\s*$|> |Running stage '|(Updating|Generating) lock file '|Stage '.*' (didn't change|is cached)"
    r"|Verifying data sources in |Use `dvc push`|To track the changes with git|\s+git add "
    r"|To enable auto staging|\s+dvc config core\.autostage"
)
"""What DVC prints of every stage, and `begin` and `end` say in fewer words."""
SECONDS = 15.0  # between two lines of progress of one DVC in a log
REFRESHES = 2  # of the table in a second
BAR = 16  # characters


@dataclass
class Work:
    """A stage at work, and its last line of progress, if it has any: parts of tqdm's."""

    stage: str
    since: float
    share: int | None = None
    done: str = ""
    speed: str = ""
    left: str = ""


class Display:
    """Shows what several writers print and are at; as a context, so that the terminal is left as it was."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.lock = threading.Lock()
        self.works: dict[int, Work] = {}
        self.whole = ""
        self.last: dict[int, float] = {}
        self.console: Console | None = None
        self.live: Live | None = None

    def __enter__(self) -> Self:
        if self.out.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.out)
            if not console.is_dumb_terminal:
                self.console = console
                self.live = Live(
                    get_renderable=self._table,
                    console=console,
                    refresh_per_second=REFRESHES,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = self.console = None
            self.say(self.whole)

    def begin(self, number: int, stage: str) -> None:
        """A writer has begun a stage."""
        self.works[number] = Work(short(stage), time.monotonic())
        if self.live is None:
            self.say(f"[{number}] {short(stage)} begins")

    def end(self, number: int, *, finished: bool) -> None:
        """Its stage is over; one that is not finished says so by itself."""
        work = self.works.pop(number, None)
        if work is not None and finished:
            self.say(f"[{number}] {work.stage}: {duration(time.monotonic() - work.since)}")

    def line(self, number: int, text: str) -> None:
        """Shows a line that a writer has printed, unless it is one of every stage."""
        text = text.rstrip()
        found = PROGRESS.match(text)
        if found is None:
            if not ROUTINE.match(text):
                self.say(f"[{number}] {text}")
            return
        if (work := self.works.get(number)) is not None:
            work.share = int(found["share"])
            work.done, work.speed, work.left = found["done"], found["speed"], found["left"]
        now = time.monotonic()
        if self.live is None and (
            now - self.last.get(number, -SECONDS) >= SECONDS or found["share"] == "100"
        ):
            self.last[number] = now
            self.say(f"[{number}] {found['what']} {found['share']}% {found['rest']}")

    def overall(self, text: str) -> None:
        """How far the whole is: a line in a log, the table's foot in a terminal."""
        self.whole = text
        if self.live is None:
            self.say(text)

    def say(self, text: str) -> None:
        """Shows a line of one's own, above the table."""
        if self.console is not None:  # which has a lock of its own, that the drawing thread may hold
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        with self.lock:
            self.out.write(f"{text}\n")
            self.out.flush()

    def _table(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, pad_edge=False, caption=self.whole, caption_justify="left", caption_style="")
        table.add_column("stage", no_wrap=True, overflow="ellipsis")
        for heading in ("", "done", "speed", "time", "left"):
            table.add_column(heading, no_wrap=True, justify="right" if heading else "left")
        for _, work in sorted([*self.works.items()]):
            bar = "" if work.share is None else ProgressBar(total=100, completed=work.share, width=BAR)
            elapsed = duration(time.monotonic() - work.since)
            table.add_row(work.stage, bar, work.done, work.speed, elapsed, work.left)
        return table


def short(stage: str) -> str:
    """`full/qkv:train@copy-0` of `studies/full/qkv/dvc.yaml:train@copy-0`."""
    return re.sub(r"^(studies/)?(.*?)/?dvc\.yaml:", lambda found: f"{found[2]}:" if found[2] else "", stage)


def duration(seconds: float) -> str:
    """As tqdm writes it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
