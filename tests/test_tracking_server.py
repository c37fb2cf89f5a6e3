"""A real MLflow server that dies during a run or never answers: the work goes on, `sync` brings the rest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from attention_transfer import run_record, tracking
from attention_transfer.tracking import database

pytestmark = pytest.mark.slow
READY_SECONDS = 120
STUDY = "core"
# A training in its own process: it says when an epoch is over and waits to be told to go on.
TRAINING = """
import sys
from pathlib import Path
from attention_transfer import tracking
with tracking.start(study="core", stage="train", name="train-copy-0", params={"lr": 0.1}, fingerprint="f0",
                    seed=0, run="copy", inputs={}, resume_run_id=None, root=Path(sys.argv[1]), patience=0.0,
                    opened=lambda run_id: print(run_id, flush=True)) as tracker:
    for epoch in (1, 2, 3):
        tracker.log_metrics({"loss": 1 / epoch}, epoch)
        sys.stdin.readline()
print("trained", flush=True)
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def database_uri() -> str | None:
    """What the server keeps its runs in; None is the default, SQLite."""
    return None


@pytest.fixture
def serve(root: Path, port: int, database_uri: str | None) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the server that `ui` starts and waits until it answers; gives its process."""
    running: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        code = "import sys, pathlib; from attention_transfer import tracking;"
        code += "tracking.serve(pathlib.Path(sys.argv[1]), port=int(sys.argv[2]))"
        with (root / "server.log").open("ab") as log:
            server = subprocess.Popen(
                [sys.executable, "-c", code, str(root), str(port)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | ({"MLFLOW_TRACKING_URI": database_uri} if database_uri else {}),
            )
        running.append(server)
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                assert server.poll() is None, (root / "server.log").read_text()
                assert time.monotonic() < deadline, (root / "server.log").read_text()
                time.sleep(0.3)
        rest(port, "experiments/search", {"max_results": 5})  # the first answer is the slow one
        return server

    yield start
    for server in running:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and its worker at once, as a crash does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def rest(port: int, call: str, content: dict[str, Any]) -> Any:
    """What a browser asks, past our code and mlflow's client."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/2.0/mlflow/{call}",
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def search(port: int, condition: str) -> list[Any]:
    experiments = rest(port, "experiments/search", {"max_results": 5})["experiments"]
    (experiment,) = [e["experiment_id"] for e in experiments if e["name"] == database.EXPERIMENT]
    found = rest(
        port, "runs/search", {"experiment_ids": [experiment], "filter": condition, "max_results": 50}
    )
    return list(found.get("runs", []))


def train(root: Path, uri: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
    )


def write_record(root: Path) -> Path:
    folder = root / "metrics" / STUDY / "train" / "copy" / "0"
    folder.mkdir(parents=True)
    content = {
        "stage": "train",
        "study": STUDY,
        "run": "copy",
        "seed": 0,
        "fingerprint": "f0",
        "params": {"lr": 0.1},
        "git_revision": None,
        "git_dirty": None,
        "started": "2026-01-02T03:04:05",
        "seconds": 2.0,
    }
    (folder / "curve.csv").write_text("epoch,loss\n1,1.0\n2,0.5\n3,0.25\n")
    run_record.write(folder, content, [folder / "curve.csv"])
    return root / "metrics"


def test_a_server_that_dies_during_a_run(
    serve: Callable[[], subprocess.Popen[bytes]], port: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{port}"
    server = serve()
    training = train(root, uri)
    assert training.stdin is not None
    assert training.stdout is not None
    run_id = training.stdout.readline().strip()
    (run,) = search(port, "tags.fingerprint = 'f0' and tags.study = 'core'")
    assert (run["info"]["run_id"], run["info"]["status"]) == (run_id, "RUNNING")
    stop(server)
    began = time.monotonic()
    output, errors = training.communicate("\n\n\n", timeout=60)
    assert time.monotonic() - began < 15
    assert (training.returncode, output) == (0, "trained\n")
    (line,) = errors.splitlines()
    assert "python -m attention_transfer sync" in line

    metrics = write_record(root)
    serve()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    report = tracking.sync(metrics, root)
    assert (report.imported, report.killed) == (("train-copy-0",), ("train-copy-0",))
    assert tracking.sync(metrics, root).imported == ()
    runs = search(port, "tags.fingerprint = 'f0' and tags.study = 'core'")
    assert sorted(run["info"]["status"] for run in runs) == ["FINISHED", "KILLED"]
    (finished,) = [run for run in runs if run["info"]["status"] == "FINISHED"]
    history = "metrics/get-history?metric_key=loss&run_id=" + finished["info"]["run_id"]
    with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/{history}", timeout=60) as answer:
        points = json.load(answer)["metrics"]
    assert [(point["step"], point["value"]) for point in points] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert len(search(port, "tags.kind = 'study'")) == 1


def test_a_server_that_never_answers(root: Path, port: int) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", port))
        silent.listen()
        training = train(root, f"http://127.0.0.1:{port}")
        began = time.monotonic()
        output, errors = training.communicate("\n\n\n", timeout=120)
    assert time.monotonic() - began < 10 + 30  # loading mlflow takes its time too
    assert (training.returncode, output) == (0, "trained\n")
    (line,) = errors.splitlines()
    assert "python -m attention_transfer sync" in line


def test_the_database_deleted_and_rebuilt_by_the_command_line_of_the_ui(
    serve: Callable[[], subprocess.Popen[bytes]], port: int, root: Path
) -> None:
    metrics = write_record(root)
    assert tracking.sync(metrics, root).imported == ("train-copy-0",)
    for file in root.glob("mlflow.db*"):
        file.unlink()
    server = serve()
    assert len(psutil.Process(server.pid).children(recursive=True)) == 1, (
        "the one worker, none that runs jobs"
    )
    assert search(port, "tags.study = 'core'") == []
    code = "import sys, pathlib; from attention_transfer import tracking; r = pathlib.Path(sys.argv[1]);"
    code += "print(len(tracking.sync(r / 'metrics', r).imported))"
    counts = [
        subprocess.run(
            [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert counts == ["1\n", "0\n"]
    (run,) = search(port, "tags.kind = 'stage' and tags.study = 'core'")  # beside the server, in one database
    assert run["info"]["status"] == "FINISHED"
