"""Where the MLflow view lies, and how it is made: once, whole, under a file lock."""

from __future__ import annotations

import os
import re
import sqlite3
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from attention_transfer import files

EXPERIMENT = "attention-transfer"
"""One experiment for all studies. Each study folds under its parent run, a fingerprint is found
whichever study it is in, and studies can be compared, which the UI does only within an experiment."""

LOCK_SECONDS = 120.0  # making the database takes about 5 s on an idle core; eight processes may wait for it
SQLITE = "sqlite:///"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # not a page of database migrations
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # By default a dead server is asked for many minutes. Two tries of 3 s keep a stage's wait under 10 s.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # A server would start eight more processes of 250 MB each, for jobs that no study has.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
"""What is set before mlflow is imported, where the user has not set it."""


@dataclass(frozen=True)
class Store:
    """An open MLflow store.

    Attributes:
        client: the `mlflow.tracking.MlflowClient`.
        experiment: id of the experiment.
        folder: where the lock file lies.
    """

    client: Any
    experiment: str
    folder: Path

    def search(self, condition: str, *, limit: int | None = None) -> list[Any]:
        """All runs (mlflow entities) that meet an MLflow filter, oldest first; at most `limit`."""
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                condition,
                max_results=limit or 1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found.extend(page)
            token = page.token
            if not token or (limit and len(found) >= limit):
                return found[:limit]


def view_folder(root: Path) -> Path:
    """The folder of the default database: DVC's root, also when a stage runs in a temporary copy."""
    return Path(os.environ.get("DVC_ROOT") or root).resolve()


def address(root: Path) -> str:
    """The store's URI: MLFLOW_TRACKING_URI, or SQLite's in `view_folder`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{view_folder(root) / 'mlflow.db'}"


def artifact_uri(root: Path) -> str:
    """file: URI of the artifacts of a store that has no server of its own."""
    return (view_folder(root) / "mlruns-artifacts").as_uri()


def is_server(uri: str) -> bool:
    """Whether a server answers at the URI; otherwise this process opens the database itself."""
    return uri.startswith(("http://", "https://", "databricks"))


def redacted(text: str) -> str:
    """`text` on one line, without the user names and passwords of URIs."""
    return re.sub(r"//[^@/\s]*@", "//", " ".join(text.split()))


def lock(folder: Path) -> FileLock:
    """The lock for what must happen once: making the database, the experiment, a study's parent run."""
    return FileLock(folder / ".mlflow.lock", timeout=LOCK_SECONDS)


def connect(root: Path) -> Store:
    """Opens the store, which is made first where it does not exist.

    Raises:
        Exception: whatever mlflow, the database or the network raises; callers decide what it means.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder, uri = view_folder(root), address(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow's own use of deprecated calls is not for our user to mend
        from mlflow.tracking import MlflowClient  # takes 3 s

        if is_server(uri):
            client = MlflowClient(tracking_uri=uri)
        else:
            with lock(folder):
                if uri.startswith(SQLITE):
                    _initialise(Path(uri.removeprefix(SQLITE)), artifact_uri(root))
                else:
                    _knock(uri)
                client = MlflowClient(tracking_uri=uri)
        return Store(
            client, _experiment(client, folder, None if is_server(uri) else artifact_uri(root)), folder
        )


def study_run(store: Store, study: str) -> str:
    """Id of the study's parent run, created already finished: nothing says when a study ends."""
    condition = f"tags.study = '{study}' and tags.kind = 'study'"
    if found := store.search(condition, limit=1):
        return str(found[0].info.run_id)
    with lock(store.folder):
        if not (found := store.search(condition, limit=1)):
            tags = {"study": study, "kind": "study"}
            run = store.client.create_run(store.experiment, run_name=study, tags=tags)
            store.client.set_terminated(run.info.run_id, "FINISHED")
            # The oldest counts, also when another machine made one at the same moment.
            found = store.search(condition, limit=1)
    return str(found[0].info.run_id)


def _experiment(client: Any, folder: Path, artifacts: str | None) -> str:
    if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
        with lock(folder):
            if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
                return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts))
    return str(found.experiment_id)


def _knock(uri: str) -> None:
    """Opens a database server once: mlflow would ask a dead one for almost two minutes, a warning each time."""
    import sqlalchemy  # which mlflow brings

    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _initialise(database: Path, artifacts: str) -> None:
    """Makes an SQLite database under another name: a crash half-way leaves none rather than a broken one.

    An empty file counts as none: that is what SQLite leaves when a database is deleted under a run.
    """
    if database.exists() and database.stat().st_size > 0:
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with files.atomic(database) as temporary:
        SqlAlchemyStore(f"{SQLITE}{temporary}", artifacts).engine.dispose()
        connection = sqlite3.connect(temporary)
        # Kept in the file. Readers and a writer at once; twice as fast with eight writers.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
        for rest in ("-wal", "-shm"):  # a deleted database's log would be replayed into the new one
            database.with_name(database.name + rest).unlink(missing_ok=True)
