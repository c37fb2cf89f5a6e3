"""Live runs: statuses, buffering, resuming, and a store that fails without disturbing the work."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_run import LiveRun, live_run

from attention_transfer import provenance, tracking
from attention_transfer.errors import StudyError
from attention_transfer.tracking import database, runs
from attention_transfer.tracking.contents import flatten

pytestmark = pytest.mark.slow  # MLflow and its database take seconds to open

RACERS = 8
RACE = Path(__file__).with_name("racing_runs.py")


@pytest.fixture(autouse=True)
def _no_outer_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the file, as making it takes seconds; each test has a study of its own."""
    return tmp_path_factory.mktemp("view")


@pytest.fixture
def begin(root: Path, request: pytest.FixtureRequest) -> Callable[..., Any]:
    def start(**changes: Any) -> Any:
        return live_run(**({"study": request.node.name, "root": root} | changes))

    return start


def found(root: Path, tracker: LiveRun) -> Any:
    assert tracker.run_id is not None
    return database.connect(root).client.get_run(tracker.run_id)


def history(root: Path, run_id: str | None, key: str) -> list[tuple[int, float]]:
    """(step, value) of every stored point, read past mlflow."""
    with sqlite3.connect(root / "mlflow.db") as connection:
        query = "select step, value from metrics where run_uuid = ? and key = ? order by step"
        rows = connection.execute(query, (run_id, key)).fetchall()
    connection.close()
    return rows


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, attention_transfer.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], str]:
    folder = tmp_path_factory.mktemp("race")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "DVC"))}
    ended = subprocess.run(
        [sys.executable, RACE, folder, str(RACERS)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return folder, json.loads(ended.stdout), ended.stderr


def test_eight_processes_at_once_on_a_fresh_database(raced: tuple[Path, list[int], str]) -> None:
    folder, codes, errors = raced
    assert codes == [0] * RACERS + [-9, 143]
    assert errors == ""
    with sqlite3.connect(folder / "mlflow.db") as connection:
        statuses = dict(connection.execute("select name, status from runs").fetchall())
        (count,) = connection.execute("select count(*) from runs").fetchone()
        points = Counter(name for (name,) in connection.execute("select run_uuid from metrics"))
        (mode,) = connection.execute("pragma journal_mode").fetchone()
        locations = connection.execute("select name, artifact_location from experiments").fetchall()
    connection.close()
    finished = {f"run-{number}": "FINISHED" for number in range(RACERS)}
    ended = {f"run-{RACERS}": "RUNNING", f"run-{RACERS + 1}": "KILLED"}
    assert statuses == {"race": "FINISHED", **finished, **ended}
    assert count == RACERS + 3  # one parent
    assert sorted(points.values())[-RACERS:] == [20] * RACERS
    assert mode == "wal"
    assert (database.EXPERIMENT, (folder / "mlruns-artifacts").as_uri()) in locations
    assert not list(folder.glob(".tmp-*"))


def test_a_dead_run_becomes_killed(raced: tuple[Path, list[int], str], tmp_path: Path) -> None:
    folder, _, _ = raced
    assert tracking.sync(tmp_path, folder).killed == (f"run-{RACERS}",)
    with sqlite3.connect(folder / "mlflow.db") as connection:
        statuses = [status for (status,) in connection.execute("select status from runs")]
    connection.close()
    assert Counter(statuses) == {"FINISHED": RACERS + 1, "KILLED": 2}
    assert tracking.sync(tmp_path, folder).killed == ()


def test_a_study_gets_one_parent_from_eight_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = database.connect(root)
    client_type = type(store.client)
    create = client_type.create_run

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.1)  # all the others have searched by then
        return create(*arguments, **named)

    monkeypatch.setattr(client_type, "create_run", slow)
    with ThreadPoolExecutor(RACERS) as pool:
        parents = list(pool.map(lambda _: database.study_run(store, "parents"), range(RACERS)))
    assert len(set(parents)) == 1
    assert len(store.search("tags.study = 'parents'")) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("loss is NaN"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
    ids=["failed", "interrupted", "terminated"],
)
def test_the_status_says_how_the_block_ended(
    begin: Callable[..., Any], root: Path, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)) as raised, begin() as tracker:  # noqa: PT012
        tracker.log_metrics({"loss": 1.0}, 1)
        raise error
    assert raised.value is error
    assert found(root, tracker).info.status == status
    assert history(root, tracker.run_id, "loss") == [(1, 1.0)]


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, None), (KeyboardInterrupt(), None), (ValueError("loss is NaN"), "FAILED")],
    ids=["finished", "interrupted", "failed"],
)
def test_a_block_that_ends_within_the_patience_is_shown_only_if_it_failed(
    begin: Callable[..., Any], root: Path, error: BaseException | None, status: str | None
) -> None:
    ids: list[str] = []
    raises = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with raises, begin(patience=60.0, opened=ids.append, wait=False) as run:
        run.log_metrics({"loss": 1.0}, 1)
        if error:
            raise error
    assert [database.connect(root).client.get_run(found).info.status for found in ids] == (
        [status] if status else []
    )
    for run_id in ids:
        assert history(root, run_id, "loss") == [(1, 1.0)]


def test_opening_holds_up_nothing(
    begin: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    connect = database.connect
    monkeypatch.setattr(runs, "connect", lambda root: release.wait(30) and connect(root))
    ids: list[str] = []
    began = time.perf_counter()
    with begin(opened=ids.append, wait=False) as run:
        for step in range(50):
            run.log_metrics({"loss": float(step)}, step)
        assert time.perf_counter() - began < 1
        assert ids == []
        release.set()
    assert history(root, ids[0], "loss") == [(step, float(step)) for step in range(50)]
    assert connect(root).client.get_run(ids[0]).info.status == "FINISHED"


def test_tags_params_inputs_and_parent(
    begin: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train@copy-0")
    monkeypatch.setenv("DVC_EXP_NAME", "muddy-wolf")
    params = {
        "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]},
        "ema": None,
        "flags": {f"p{i}": i for i in range(150)},
    }
    with begin(params=params, inputs={"split": "a" * 64, "teacher": "b"}) as tracker:
        assert found(root, tracker).info.status == "RUNNING"
    store = database.connect(root)
    (run,) = store.client.search_runs(
        [store.experiment],
        "tags.study = 'test_tags_params_inputs_and_parent' and tags.`dvc.stage` = 'train@copy-0'"
        " and tags.`dvc.exp` = 'muddy-wolf' and tags.fingerprint = 'f0' and tags.run = 'copy'"
        " and tags.seed = '0'",
    )
    assert run.info.run_id == tracker.run_id
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "train-copy-0"
    assert len(run.data.params) == 153
    assert run.data.tags.get("git_revision") == provenance.git_state()["git_revision"]
    assert run.data.params["optimizer.lr"] == "0.0003"
    assert run.data.params["optimizer.betas"] == "[0.9, 0.95]"
    assert run.data.params["ema"] == "null"
    assert {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs} == {
        ("split", "a" * 36),
        ("teacher", "b"),
    }
    parent = store.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert (parent.info.run_name, parent.info.status) == ("test_tags_params_inputs_and_parent", "FINISHED")


def test_a_thousand_metrics_arrive_in_few_calls_and_off_the_training_thread(
    begin: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_type = type(database.connect(root).client)
    calls: list[tuple[str, int]] = []
    send = client_type.log_batch

    def spy(self: Any, run_id: str, metrics: Any = (), **rest: Any) -> None:
        if metrics:
            calls.append((threading.current_thread().name, len(metrics)))
        send(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(client_type, "log_batch", spy)
    with begin() as tracker:
        began = time.perf_counter()
        for step in range(1000):
            tracker.log_metrics({"loss": 1 / (step + 1), "accuracy": step / 1000}, step)
        took = time.perf_counter() - began
    assert took < 1.0
    assert history(root, tracker.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(1000)]
    assert history(root, tracker.run_id, "accuracy") == [(step, step / 1000) for step in range(1000)]
    assert sum(count for _, count in calls) == 2000
    assert len(calls) <= 4
    assert {name for name, _ in calls} == {"mlflow"}


def test_metrics_are_shown_while_the_run_works(
    begin: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.05)
    with begin() as tracker:
        tracker.log_metrics({"loss": 0.5}, 1)
        deadline = time.monotonic() + 10
        while not history(root, tracker.run_id, "loss"):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_not_a_number_is_shown(begin: Callable[..., Any], root: Path) -> None:
    with begin() as tracker:
        tracker.log_metrics({"loss": float("nan"), "norm": float("inf")}, 3)
    assert found(root, tracker).info.status == "FINISHED"
    assert str(found(root, tracker).data.metrics["loss"]) == "nan"


def test_an_artifact_is_kept_and_a_missing_one_does_no_harm(
    begin: Callable[..., Any], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "figure.txt").write_text("map")
    with begin() as tracker:
        tracker.log_artifact(tmp_path / "missing.txt")
        tracker.log_artifact(tmp_path / "figure.txt")
        tracker.log_metrics({"loss": 1.0}, 1)
    assert (root / "mlruns-artifacts" / tracker.run_id / "artifacts" / "figure.txt").read_text() == "map"
    assert found(root, tracker).info.status == "FINISHED"
    assert capsys.readouterr().err.count("warning:") == 1


def test_a_resumed_run_goes_on_without_doubled_steps(begin: Callable[..., Any], root: Path) -> None:
    with pytest.raises(SystemExit), begin(params={"lr": 1}) as first:  # noqa: PT012
        for step in range(1, 6):
            first.log_metrics({"loss": 10.0 - step}, step)
        raise SystemExit(143)
    with begin(params={"lr": 1}, resume_run_id=first.run_id) as second:
        resumed = found(root, second)
        for step in range(4, 9):  # from the checkpoint of epoch 3
            second.log_metrics({"loss": 10.0 - step, "late": 1.0}, step)
    assert second.run_id == first.run_id
    assert resumed.info.status == "RUNNING"
    assert found(root, second).info.status == "FINISHED"
    assert found(root, second).info.end_time > resumed.info.end_time
    assert history(root, second.run_id, "loss") == [(step, 10.0 - step) for step in range(1, 9)]
    assert [step for step, _ in history(root, second.run_id, "late")] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "another_fingerprint"])
def test_a_run_that_cannot_be_resumed_is_made_anew(
    begin: Callable[..., Any], root: Path, known: bool
) -> None:
    other = "0" * 32
    if known:
        with begin(fingerprint="before") as first:
            pass
        other = first.run_id
    with begin(resume_run_id=other) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    assert tracker.run_id not in {None, other}
    assert found(root, tracker).info.status == "FINISHED"


def test_a_dead_server_costs_one_line_and_no_time(
    begin: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    began = time.perf_counter()
    with begin() as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_artifact(Path("figure.txt"))
    assert time.perf_counter() - began < 10
    assert tracker.run_id is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "python -m attention_transfer sync" in line
    assert "secret" not in line
    with pytest.raises(ZeroDivisionError), begin():
        _ = 1 / 0


def test_without_mlflow_the_work_goes_on(
    begin: Callable[..., Any],
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with begin() as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    assert tracker.run_id is None
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(StudyError, match="pip install"):
        tracking.sync(tmp_path, root)


@pytest.fixture
def break_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Runs a fault before whatever is sent of metrics."""

    def install(fault: Callable[[], None]) -> None:
        client_type = type(database.connect(root).client)
        send = client_type.log_batch

        def faulty(self: Any, run_id: str, metrics: Any = (), **rest: Any) -> None:
            if metrics:
                fault()
            send(self, run_id, metrics=metrics, **rest)

        monkeypatch.setattr(client_type, "log_batch", faulty)

    return install


def test_a_store_that_fails_for_a_while_gets_everything(
    begin: Callable[..., Any],
    root: Path,
    break_store: Callable[[Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(runs, "RETRY_SECONDS", 0.02)
    faults: Iterator[int] = iter(range(3))
    failed = threading.Event()

    def fault() -> None:
        if next(faults, None) is not None:
            raise ConnectionError("away")
        failed.set()

    break_store(fault)
    with begin() as tracker:
        for step in range(50):
            tracker.log_metrics({"loss": float(step)}, step)
        assert failed.wait(10)
    assert history(root, tracker.run_id, "loss") == [(step, float(step)) for step in range(50)]
    assert found(root, tracker).info.status == "FINISHED"
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_was_not_sent_whole_is_never_finished(
    begin: Callable[..., Any],
    root: Path,
    break_store: Callable[[Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fault() -> None:
        raise ConnectionError("away for good")

    break_store(fault)
    with begin() as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    assert found(root, tracker).info.status == "RUNNING"
    assert capsys.readouterr().err.count("\n") == 1


def test_a_store_that_hangs_holds_the_stage_for_a_bounded_time(
    begin: Callable[..., Any],
    break_store: Callable[[Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert runs.CLOSE_SECONDS < 10
    monkeypatch.setattr(runs, "CLOSE_SECONDS", 0.2)
    release = threading.Event()
    break_store(lambda: _ignore(release.wait(30)))
    began = time.perf_counter()
    with begin() as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    took = time.perf_counter() - began
    release.set()
    next(thread for thread in threading.enumerate() if thread.name == "mlflow").join(10)
    assert took < 5
    assert capsys.readouterr().err.count("\n") == 1


def _ignore(_: object) -> None:
    """A fault returns nothing."""


def test_the_view_lies_in_the_main_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert database.address(tmp_path / "copy") == f"sqlite:///{tmp_path / 'main' / 'mlflow.db'}"
    assert database.artifact_uri(tmp_path / "copy") == (tmp_path / "main" / "mlruns-artifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert database.address(tmp_path / "copy") == "http://somewhere:5000"


names = st.text("ab0", min_size=1, max_size=3)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.lists(st.integers())
branches = st.dictionaries(names, st.dictionaries(names, leaves, min_size=1) | leaves, min_size=1)
trees = st.dictionaries(names, branches | leaves)


@settings(max_examples=50, deadline=None)
@given(trees)
def test_flattened_params_hold_every_value(tree: dict[str, Any]) -> None:
    rebuilt: dict[str, Any] = {}
    for name, text in flatten(tree).items():
        *folders, leaf = name.split(".")
        place = rebuilt
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = json.loads(text)
    assert rebuilt == tree
