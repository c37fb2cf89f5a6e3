"""One start of a study, whose output tells where it is, and which can be struck."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator

import psutil
from copies import GRAPH, MARK, PARAMS, Study

PATIENCE = 60.0  # seconds that a killed run may take to end


class Run:
    """One `dvc repro` in a session of its own, or with jobs what starts several.

    As `make study` does, a look at params.yaml and at what a kill has left comes first.
    """

    def __init__(self, study: Study, jobs: int = 0) -> None:
        study.check()
        self.study, self.mark = study, uuid.uuid4().hex
        self.output: list[str] = []
        self.stage, self.since = "", time.monotonic()  # the stage that runs, and since when
        self.locking = threading.Event()  # set while DVC writes its lock file
        self.changed = threading.Condition()
        several = (
            sys.executable,
            "-m",
            "attention_transfer",
            "run",
            "--params",
            PARAMS,
            "--jobs",
            str(jobs),
        )
        command = several if jobs else ("dvc", "repro", GRAPH)
        self.process = study.begin(*command, mark=self.mark, session=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            with self.changed:
                if found := re.search(r"Running stage '[^:]*:([^']*)'", line):
                    self.stage, self.since = found[1], time.monotonic()
                    self.locking.clear()
                elif line.startswith("Updating lock file"):
                    self.locking.set()
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    def completed(self) -> Counter[str]:
        """The stages that ended well and are in DVC's lock file, as far as is known now."""
        found = re.findall(r"Running stage '[^:]*:([^']*)'", "".join(self.output))
        return Counter(found if self.process.returncode == 0 else found[:-1])

    def skipped(self) -> set[str]:
        """The stages that DVC took for made."""
        return set(re.findall(r"Stage '[^:]*:([^']*)' didn't change, skipping", "".join(self.output)))

    def stages(self) -> Iterator[str]:
        """Each stage as it begins, until the run ends."""
        seen = ""
        while self.reader.is_alive() or self.stage != seen:
            with self.changed:
                if self.stage == seen:
                    self.changed.wait(timeout=0.5)
                now = self.stage
            if now != seen:
                yield (seen := now)

    def processes(self) -> list[psutil.Process]:
        """Every living process of this start, whatever its parent now is."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def strike(self, target: str, number: signal.Signals) -> bool:
        """Sends the signal; False if what it was for had ended by itself."""
        try:
            match target:
                case "dvc":
                    os.kill(self.process.pid, number)
                case "group":
                    os.killpg(self.process.pid, number)
                case "stage":
                    children = psutil.Process(self.process.pid).children(recursive=True)
                    scripts = [child for child in children if "pipeline/" in " ".join(child.cmdline())]
                    if not scripts:
                        return False
                    scripts[-1].send_signal(number)
        except (ProcessLookupError, psutil.Error):
            return False
        return True

    def end(self) -> int:
        """Waits for the end of all of it: DVC's exit code.

        Raises:
            AssertionError: a process is left over.
        """
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        until = time.monotonic() + PATIENCE
        while left := self.processes():
            assert time.monotonic() < until, f"left over: {[process.cmdline() for process in left]}"
            time.sleep(0.05)
        return code
