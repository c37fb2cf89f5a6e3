"""A script: many runs begun at the same moment on one store; prints how their processes ended.

    python tests/racing_runs.py FOLDER NUMBER

NUMBER runs end well, one more kills itself, and the last is told to stop. One interpreter loads mlflow once and
forks: an import for each would take half a minute.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from attention_transfer import tracking
from attention_transfer.tracking import database, runs


def race(root: Path, number: int, racers: int) -> None:
    name, is_open = f"run-{number}", threading.Event()
    with tracking.start(
        study="race",
        stage="train",
        name=name,
        params={"number": number},
        fingerprint=name,
        seed=number,
        run="copy",
        inputs={},
        resume_run_id=None,
        opened=lambda run_id: is_open.set(),
        patience=0.0,
        root=root,
    ) as tracker:
        for step in range(20):
            tracker.log_metrics({"loss": step / 2}, step)
        if number == racers and is_open.wait(60):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == racers + 1:
            raise SystemExit(143)


def main() -> None:
    root, racers = Path(sys.argv[1]), int(sys.argv[2])
    os.environ |= database.ENVIRONMENT
    runs.CLOSE_SECONDS = 120.0  # whether all arrives is asked here, not how soon
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking  # noqa: F401

    go, gate = os.pipe()
    children = []
    for number in range(racers + 2):
        if not (child := os.fork()):
            code: object = 1
            try:
                os.close(gate)
                os.read(go, 1)  # until every process is there
                race(root, number, racers)
                code = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                os._exit(code if isinstance(code, int) else 1)
        children.append(child)
    os.close(gate)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


if __name__ == "__main__":
    main()
