"""A PostgreSQL server for tests, from Debian's package: a cluster of its own in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

READY_SECONDS = 60
USER = "mlflow"


class PostgresServer:
    """Listens on 127.0.0.1 alone. PostgreSQL refuses to run as root: then it runs as `nobody`."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        self._owner = "nobody" if os.geteuid() == 0 else None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        folder.chmod(0o700)
        if self._owner:
            shutil.chown(folder, self._owner)
        self._process: subprocess.Popen[bytes] | None = None
        made = subprocess.run(
            [
                programs / "initdb",
                "--pgdata",
                folder / "data",
                "--username",
                USER,
                "--auth",
                "trust",
                "-E",
                "UTF8",
            ],
            user=self._owner,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr

    @property
    def uri(self) -> str:
        return f"postgresql://{USER}:secret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = ("-c", f"port={self.port}", "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off")
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._folder / "data", "-k", self._folder, *options],
                user=self._owner,
                cwd="/",
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_SECONDS
        asks = [self._programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(asks, check=False).returncode:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """At once, connections and all."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None


def programs() -> Path | None:
    """Folder of PostgreSQL's programs; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


@contextlib.contextmanager
def postgres() -> Iterator[PostgresServer]:
    """A running server. The test is skipped where `make test` could not install PostgreSQL."""
    if (found := programs()) is None:
        pytest.skip("PostgreSQL is not installed, and may not be: apt-get install postgresql")
    # Not one of pytest's folders: they are closed to `nobody`, and too long for a socket's name.
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = PostgresServer(found, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
