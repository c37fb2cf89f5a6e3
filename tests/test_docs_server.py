"""docs/storage.md, "One MLflow server for all": its commands as they stand, on a PostgreSQL that has nothing yet."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import postgres_server
import prepared_study
import pytest
from postgres_server import PostgresServer, postgres, programs
from test_tracking_server import READY_SECONDS, rest, search, write_record

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "storage.md"
HEADING = "## One MLflow server for all"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """With an administrator, and no user of MLflow's."""
    monkeypatch.setattr(postgres_server, "USER", "administrator")
    with postgres() as running:
        yield running


def blocks() -> list[list[str]]:
    """The page's commands: of the administrator, of the server, of each machine that computes."""
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"(?ms)^```\n(.*?)^```$", section)]


def surroundings() -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_TR", "PG"))
    }
    path = os.pathsep.join([str(programs()), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "ATTENTION_TRANSFER_DEVICE": "cpu"}


def run(commands: list[str], folder: Path, **more: str) -> str:
    done = subprocess.run(
        ["sh", "-ec", "\n".join(commands)],
        cwd=folder,
        env={**surroundings(), **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_the_pages_commands_bring_runs_to_a_server_on_postgresql(
    server: PostgresServer, tmp_path: Path
) -> None:
    administrator, serving, computing = blocks()
    assert [line.split()[0] for line in administrator] == ["createuser", "createdb", "pip"]
    # The driver is one of the tests' own packages; the cluster is not where PostgreSQL is by itself.
    address = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": "administrator"}
    run(administrator[:2], tmp_path, **address)

    repository, port = tmp_path / "repository", free_port()
    prepared_study.copy(repository)
    shutil.rmtree(repository / "metrics")
    write_record(repository)
    [line] = serving
    for where, instead in (
        ("@localhost/", f"@127.0.0.1:{server.port}/"),
        ("/srv/mlflow", str(tmp_path / "artifacts")),
        ("--port 5000", f"--port {port}"),
    ):
        assert line.count(where) == 1
        line = line.replace(where, instead)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", f"exec {line}"],
            cwd=tmp_path,
            env={
                **surroundings(),
                "MLFLOW_WORKERS": "1",  # by itself it has 4, which take longer to start
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # as the page says
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(process, port, tmp_path / "log")
        rest(port, "experiments/search", {"max_results": 5})  # the first answer is the slow one
        here = [command.replace(":5000", f":{port}") for command in computing]
        assert here != computing
        source = {"PYTHONPATH": str(repository / "src")}
        told = run(here, repository, **source)
        assert f"127.0.0.1:{port}" in told
        assert "PROBLEM" not in told
        [found] = search(port, "tags.study = 'core' and tags.fingerprint = 'f0'")
        assert found["info"]["status"] == "FINISHED"
        # "the runs that it does not have yet .. and a second time nothing"
        run([here[0], here[-1]], repository, **source)
        assert len(search(port, "tags.study = 'core' and tags.fingerprint = 'f0'")) == 1
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until it answers."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
