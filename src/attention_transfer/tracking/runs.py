"""One run, shown live: everything is sent by a background thread that never stops the work."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from attention_transfer import provenance
from attention_transfer.tracking.contents import log_inputs, log_params, log_tags, process_tags, run_tags
from attention_transfer.tracking.database import Store, address, connect, redacted, study_run

FLUSH_SECONDS = 2.0  # a call costs 20 to 200 ms, whatever it carries
RETRY_SECONDS = 30.0  # between tries while the store fails
CLOSE_SECONDS = 8.0  # the longest that a stage waits for the store at its end
BATCH = 1000  # MLflow's limit of metrics in one call


class Tracker(Protocol):
    """Takes what a stage wants to show. Nothing here raises or waits for a store."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Shows values at a step (the epoch, as in curve.csv); the first value of a name and step counts."""

    def log_artifact(self, path: Path) -> None:
        """Shows a file, which must stay until the run has ended."""


@contextlib.contextmanager
def start(
    *,
    study: str,
    stage: str,
    name: str,
    params: Mapping[str, Any],
    fingerprint: str,
    seed: int | None,
    run: str | None,
    inputs: Mapping[str, str],
    resume_run_id: str | None,
    opened: Callable[[str], None],
    patience: float,
    root: Path,
) -> Iterator[Tracker]:
    """Shows the block as a run, a child of its study's: FINISHED, FAILED or KILLED as the block ends.

    Opening takes 3 s, in the background. A store that fails costs one warning line and less than 10 s:
    `sync` imports the run later.

    Args:
        params: nested as in params.yaml; logged under dotted names.
        inputs: digest of each named input, logged as data sets.
        resume_run_id: the run to go on with; a new one is made if the store does not hold it, or
            holds it with another fingerprint. Steps that it has already logged are not logged again.
        opened: called in the background with MLflow's id of the run, once it has one.
        patience: seconds before the run is opened. A block that ends sooner is not shown: its record is
            there for `sync`. One that fails sooner is.
        root: repository; the default store lies in DVC_ROOT, or here.
    """

    def open_run() -> tuple[Store, str, dict[str, set[int]]]:
        store = connect(root)
        tags = {
            **run_tags(
                study=study,
                stage=stage,
                fingerprint=fingerprint,
                run=run,
                seed=seed,
                **provenance.git_state(),
            ),
            **{f"dvc.{key}": value for key, value in provenance.dvc_stage().items()},
            **process_tags(),
            "mlflow.parentRunId": study_run(store, study),
        }
        run_id, logged = _resume(store, resume_run_id, fingerprint, tags) or (None, {})
        if run_id is None:
            run_id = store.client.create_run(store.experiment, run_name=name, tags=tags).info.run_id
        opened(run_id)
        log_params(store, run_id, params)
        log_inputs(store, run_id, inputs)
        return store, run_id, logged

    tracker = _LiveRun(open_run, patience, address(root))
    try:
        yield tracker
    except (KeyboardInterrupt, SystemExit):
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("FINISHED")


def _resume(
    store: Store, run_id: str | None, fingerprint: str, tags: Mapping[str, str]
) -> tuple[str, dict[str, set[int]]] | None:
    """Sets an interrupted run going again; gives its id and the steps logged of each metric."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        found = store.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if found.info.lifecycle_stage != "active" or found.data.tags.get("fingerprint") != fingerprint:
        return None
    store.client.update_run(run_id, status="RUNNING")
    log_tags(store, run_id, tags)
    history = store.client.get_metric_history
    return run_id, {key: {point.step for point in history(run_id, key)} for key in found.data.metrics}


def _warn(uri: str, error: BaseException) -> None:
    reason = redacted(f"{type(error).__name__}: {error}")[:200]
    print(
        f"warning: MLflow at {redacted(uri)} fails ({reason}); the work goes on, "
        "show this run there later with: python -m attention_transfer sync",
        file=sys.stderr,
        flush=True,
    )


class Unshown:
    """Shows nothing: in stages that `sync` shows afterwards."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_artifact(self, path: Path) -> None:
        pass


class _LiveRun:
    """A run that one background thread opens, and to which it sends what has gathered.

    A run that could not be sent whole is left RUNNING: `sync` then sees that its process has gone and
    imports the whole run from its record, which it would not do beside a FINISHED one.

    Args:
        open_run: opens it; gives the store, the run's id, and the steps that it holds of each metric.
    """

    def __init__(
        self, open_run: Callable[[], tuple[Store, str, dict[str, set[int]]]], patience: float, uri: str
    ) -> None:
        self._open_run, self._patience, self._uri = open_run, patience, uri
        self._status = "FINISHED"
        self._warned = False
        self._guard = threading.Lock()
        self._seen: dict[str, set[int]] = {}
        self._metrics: list[tuple[str, float, int, int]] = []
        self._artifacts: list[Path] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        with self._guard:
            for key, value in metrics.items():
                steps = self._seen.setdefault(key, set())
                if step not in steps:
                    steps.add(step)
                    self._metrics.append((key, float(value), now, step))

    def log_artifact(self, path: Path) -> None:
        with self._guard:
            self._artifacts.append(path)

    def close(self, status: str) -> None:
        """Sends the rest and ends the run; waits CLOSE_SECONDS at most."""
        self._status = status
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(TimeoutError(f"no answer within {CLOSE_SECONDS:.0f} s"))

    def _work(self) -> None:
        if self._closing.wait(self._patience) and self._patience and self._status != "FAILED":
            return
        try:
            store, run_id, logged = self._open_run()
        except Exception as error:  # whatever is wrong with the view, the study does not need it
            self._fail(error)
            return

        def flush() -> None:
            self._flush(store.client, run_id, logged)

        pause = 0.0
        while not self._closing.wait(pause):
            pause = FLUSH_SECONDS if self._attempt(flush) else RETRY_SECONDS
        if self._attempt(flush):
            self._attempt(lambda: store.client.set_terminated(run_id, self._status))

    def _attempt(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever it is, it must not end the thread unseen
            self._fail(error)
            return False
        return True

    def _fail(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            _warn(self._uri, error)

    def _flush(self, client: Any, run_id: str, logged: dict[str, set[int]]) -> None:
        """Sends what has gathered. Sending a metric twice is harmless: its time stamp is part of its key."""
        from mlflow.entities import Metric

        while True:
            with self._guard:
                batch = self._metrics[:BATCH]
            if not batch:
                break
            fresh = [Metric(*point) for point in batch if point[3] not in logged.get(point[0], ())]
            client.log_batch(run_id, metrics=fresh)
            with self._guard:
                del self._metrics[: len(batch)]
        while True:
            with self._guard:
                if not self._artifacts:
                    break
                path = self._artifacts.pop(0)
            # Tried once: a file that cannot be shown must not hold up the metrics.
            self._attempt(lambda path=path: client.log_artifact(run_id, str(path)))  # type: ignore[misc]
