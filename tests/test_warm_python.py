"""A stage that the tests start as a fork is what `python` would have started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm_python

SCRIPT = """
import atexit, json, os, sys
import beside
atexit.register(lambda: print("at exit", flush=True))
print(json.dumps({
    "main": __name__, "file": __file__, "argv": sys.argv, "folder": os.getcwd(), "path": sys.path,
    "variable": os.environ.get("VARIABLE"), "read": sys.stdin.read(), "warm": "torch" in sys.modules,
    "project": [name for name in sys.modules if name.startswith("attention_transfer")], "python": sys.executable,
}))
print("complaint", file=sys.stderr)
sys.exit(3)
"""
SLEEPS = """
import pathlib, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm_python.folder(tmp_path_factory.mktemp("w")) as folder:
        yield folder


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Also where these tests have been put into the background, whose processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "stage.py").write_text(SCRIPT)
    (tmp_path / "pipeline" / "sleeps.py").write_text(SLEEPS)
    (tmp_path / "pipeline" / "beside.py").write_text("")
    return tmp_path


def start(
    warm: Path | None, place: Path, *arguments: str, pipe: int = subprocess.DEVNULL, **environment: str | None
) -> subprocess.Popen[str]:
    first = [] if warm is None else [str(warm)]
    path = os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ["PATH"]])
    values = os.environ | warm_python.SETTINGS | {"PATH": path} | environment
    return subprocess.Popen(
        ["/bin/sh", "-c", " ".join(["exec python", *arguments])],
        cwd=place,
        env={key: value for key, value in values.items() if value is not None},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def said(
    warm: Path | None, place: Path, *arguments: str, **environment: str | None
) -> tuple[dict[str, Any], str, str, int]:
    process = start(warm, place, *arguments, pipe=subprocess.PIPE, **environment)
    out, complaint = process.communicate("asked", timeout=60)
    first, _, rest = out.partition("\n")
    return json.loads(first), rest, complaint, process.returncode


def test_a_fork_is_what_python_starts(warm: Path, place: Path) -> None:
    arguments = ("pipeline/stage.py", "--run", "copy")
    environment = {"VARIABLE": "value", "PYTHONPATH": f"/first{os.pathsep}/second"}
    ours, theirs = (said(folder, place, *arguments, **environment) for folder in (warm, None))
    assert (ours[0].pop("warm"), theirs[0].pop("warm")) == (True, False)
    assert ours == theirs
    assert theirs[1:] == ("at exit\n", "complaint\n", 3)


@pytest.mark.parametrize("threads", ["2", None])
def test_other_threads_get_the_ordinary_python(threads: str | None, warm: Path, place: Path) -> None:
    assert not said(warm, place, "pipeline/stage.py", OMP_NUM_THREADS=threads)[0]["warm"]


@pytest.mark.parametrize(
    ("named", "cold"), [("stage", True), ("train,stage", True), ("train", False), ("", False)]
)
def test_a_stage_that_is_named_gets_the_ordinary_python(
    named: str, cold: bool, warm: Path, place: Path
) -> None:
    assert said(warm, place, "pipeline/stage.py", COLD_STAGES=named)[0]["warm"] is not cold


def test_what_is_no_stage_gets_the_ordinary_python(warm: Path, place: Path) -> None:
    script = "'import json, sys; print(json.dumps({0: sys.executable, 1: \"torch\" in sys.modules}))'"
    assert said(warm, place, "-c", script)[0] == {
        "0": str(Path(sys.executable).parent / "python"),
        "1": False,
    }


def sleeping(warm: Path, place: Path) -> tuple[subprocess.Popen[str], int]:
    """A started client and the process of its stage."""
    client = start(warm, place, "pipeline/sleeps.py")
    deadline = time.monotonic() + 60
    while not (place / "pid").exists() or not (place / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return client, int((place / "pid").read_text())


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 5), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_signals_reach_the_stage(number: signal.Signals, code: int, warm: Path, place: Path) -> None:
    client, stage = sleeping(warm, place)
    assert stage != client.pid
    client.send_signal(number)
    assert client.wait(60) == code
    deadline = time.monotonic() + 60
    while psutil.pid_exists(stage):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_ignored_stays_ignored(warm: Path, place: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    client, _ = sleeping(warm, place)
    client.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert client.poll() is None
    client.send_signal(signal.SIGTERM)
    assert client.wait(60) == 5


def test_a_killed_stage_is_told(warm: Path, place: Path) -> None:
    client, stage = sleeping(warm, place)
    os.kill(stage, signal.SIGKILL)
    assert client.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("ending", "code", "complaint"),
    [
        ("", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('what was wrong')", 1, "what was wrong\n"),
        ("raise ValueError('broken')", 1, "ValueError: broken\n"),
        ("import threading; threading.Thread(target=lambda: print(2, file=sys.stderr)).start()", 0, "2\n"),
    ],
)
def test_every_ending(ending: str, code: int, complaint: str, warm: Path, place: Path) -> None:
    (place / "pipeline" / "stage.py").write_text(f"import sys; print({{}})\n{ending}")
    _, _, told, found = said(warm, place, "pipeline/stage.py")
    assert (found, told[len(told) - len(complaint) :]) == (code, complaint)
    assert complaint or not told


def test_without_a_server_nothing_is_taken_for_done(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with warm_python.folder(tmp_path_factory.mktemp("w")) as folder:
        client, stage = sleeping(folder, place)
        server = psutil.Process(stage).parent()
        assert server is not None
        server.kill()
        assert client.wait(60) == 1
        os.kill(stage, signal.SIGKILL)
    assert start(folder, place, "pipeline/stage.py").wait(60) == 1
