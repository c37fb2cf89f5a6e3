"""A live run for tests: opened at once, and waited for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_transfer import tracking

DEFAULTS: dict[str, Any] = {
    "stage": "train",
    "name": "train-copy-0",
    "params": {},
    "fingerprint": "f0",
    "seed": 0,
    "run": "copy",
    "inputs": {},
    "resume_run_id": None,
    "patience": 0.0,
}


@dataclass
class LiveRun:
    """A tracker and MLflow's id of its run; None where the store could not be opened."""

    tracker: tracking.Tracker
    run_id: str | None

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.tracker.log_metrics(metrics, step)

    def log_artifact(self, path: Path) -> None:
        self.tracker.log_artifact(path)


@contextlib.contextmanager
def live_run(*, wait: bool = True, **given: Any) -> Iterator[LiveRun]:
    """`tracking.start` with DEFAULTS for what is not given; waits until the run is open, or cannot be."""
    ids: list[str] = []
    with tracking.start(**(DEFAULTS | {"opened": ids.append} | given)) as tracker:
        while wait and not ids and any(thread.name == "mlflow" for thread in threading.enumerate()):
            time.sleep(0.01)
        yield LiveRun(tracker, ids[0] if ids else None)
