"""A dying database, and eight runs at once, on PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres_server import PostgresServer, postgres
from test_tracking_server import (  # noqa: F401  the fixtures
    port,
    root,
    search,
    serve,
    train,
    write_record,
)

from attention_transfer import tracking
from attention_transfer.tracking import database

pytestmark = pytest.mark.slow
RACERS = 8


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with postgres() as running:
        yield running


@pytest.fixture
def database_uri(server: PostgresServer) -> str:
    return server.uri


def test_eight_processes_at_once_on_a_fresh_database(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    script = Path(__file__).with_name("racing_runs.py")
    ended = subprocess.run(
        [sys.executable, script, tmp_path, str(RACERS)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{[0] * RACERS + [-9, 143]}\n"
    store = database.connect(tmp_path)
    runs = {run.info.run_name: run for run in store.search("tags.study = 'race'")}
    finished = {f"run-{number}": "FINISHED" for number in range(RACERS)}
    ends = {f"run-{RACERS}": "RUNNING", f"run-{RACERS + 1}": "KILLED"}
    assert {name: run.info.status for name, run in runs.items()} == {"race": "FINISHED", **finished, **ends}
    assert len(store.search("tags.study = 'race'")) == RACERS + 3  # one parent
    history = store.client.get_metric_history
    points = Counter({name: len(history(runs[name].info.run_id, "loss")) for name in finished})
    assert set(points.values()) == {20}
    assert tracking.sync(tmp_path / "metrics", tmp_path).killed == (f"run-{RACERS}",)


def test_the_database_dies_under_the_server(
    serve: Callable[[], subprocess.Popen[bytes]],  # noqa: F811
    server: PostgresServer,
    port: int,  # noqa: F811
    root: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server then answers every request with an error: as good as none, until the database is back."""
    uri = f"http://127.0.0.1:{port}"
    serve()
    training = train(root, uri)
    assert training.stdout is not None
    assert training.stdout.readline().strip()
    server.stop()
    output, errors = training.communicate("\n\n\n", timeout=60)
    assert (training.returncode, output) == (0, "trained\n")
    (line,) = errors.splitlines()
    assert "python -m attention_transfer sync" in line
    assert "secret" not in line

    server.start()
    metrics = write_record(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking.sync(metrics, root).imported == ("train-copy-0",)
    assert tracking.sync(metrics, root).imported == ()
    runs = search(port, "tags.fingerprint = 'f0' and tags.study = 'core'")
    assert sorted(run["info"]["status"] for run in runs) == ["FINISHED", "KILLED"]


def test_the_ui_tells_a_database_that_is_away(server: PostgresServer, root: Path) -> None:  # noqa: F811
    server.stop()
    ended = subprocess.run(
        [sys.executable, "-m", "attention_transfer", "ui", "--port", "0"],
        cwd=root,
        env=os.environ | {"MLFLOW_TRACKING_URI": server.uri},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert f"127.0.0.1:{server.port}" in ended.stderr
    assert "secret" not in ended.stderr
    assert "Traceback" not in ended.stderr
