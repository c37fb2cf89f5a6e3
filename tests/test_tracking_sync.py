"""The view made whole from records: nothing missing, nothing twice, the dead marked."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from live_run import live_run

from attention_transfer import files, run_record, tracking
from attention_transfer.errors import StudyError
from attention_transfer.tracking import database

pytestmark = pytest.mark.slow  # MLflow and its database take seconds to open

EPOCHS = 3


@pytest.fixture(autouse=True)
def _no_outer_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the file; each test has a study of its own."""
    return tmp_path_factory.mktemp("view")


@pytest.fixture
def study(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def record(tmp_path: Path, study: str) -> Callable[..., Path]:
    """Writes run.json, and for a training metrics.json and curve.csv, under tmp_path/metrics."""

    def write(stage: str = "train", run: str | None = "copy", seed: int | None = 0, **changes: Any) -> Path:
        folder = tmp_path.joinpath(
            "metrics", study, stage, *(str(part) for part in (run, seed) if part is not None)
        )
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "stage": stage,
            "study": study,
            "run": run,
            "seed": seed,
            "fingerprint": f"{stage}-{run}-{seed}",
            "params": {"optimizer": {"lr": 0.1}},
            "git_revision": "a" * 40,
            "git_dirty": False,
            "dvc": {"exp": "muddy-wolf"},
            "versions": {"torch": "2.15.0"},
            "machine": {"device": "cpu", "cores": 2},
            "started": "2026-01-02T03:04:05+00:00",
            "seconds": 60.5,
            "peak_memory_mb": 512.0,
        }
        content = {key: value for key, value in (content | changes).items() if value is not None}
        if stage == "train":
            rows = [
                f"{epoch},{epoch * 10},{1 / epoch},,0.1,{'' if epoch == 2 else epoch / 10}"
                for epoch in (1, 2, 3)
            ]
            header = "epoch,step,task_loss,attention_loss,learning_rate,validation_accuracy"
            (folder / "curve.csv").write_text("\n".join([header, *rows, ""]))
            summary = {"validation_accuracy": 0.3, "parameters": 1000, "epochs": EPOCHS}
            (folder / "metrics.json").write_text(json.dumps(summary))
        run_record.write(folder, content, [*folder.glob("metrics.json"), *folder.glob("curve.csv")])
        return folder

    return write


def shown(root: Path, study: str) -> list[Any]:
    store = database.connect(root)
    return store.search(f"tags.study = '{study}' and tags.kind = 'stage'")


def live(root: Path, study: str, error: BaseException | None = None, **changes: Any) -> str:
    given = {
        "study": study,
        "root": root,
        "fingerprint": "train-copy-0",
        "params": {"optimizer": {"lr": 0.1}},
    }
    expected = [type(error)] if error else []
    with contextlib.suppress(*expected), live_run(**(given | changes)) as tracker:
        if error:
            raise error
    assert tracker.run_id is not None
    return tracker.run_id


def test_a_fresh_view_gets_every_record_once(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path
) -> None:
    for seed in range(2):
        record(seed=seed, inputs={"split": "d" * 64})
    record("evaluate", None, None)
    first = tracking.sync(tmp_path / "metrics", root)
    assert first.imported == ("evaluate", "train-copy-0", "train-copy-1")
    assert (first.present, first.killed, first.tagged) == (0, (), ())
    assert str(first) == "3 runs brought into MLflow; 0 were there"
    second = tracking.sync(tmp_path / "metrics", root)
    assert second == tracking.SyncReport(imported=(), present=3, killed=(), tagged=())
    assert str(second) == "0 runs brought into MLflow; 3 were there"
    runs = {run.info.run_name: run for run in shown(root, study)}
    assert len(runs) == 3
    run, store = runs["train-copy-1"], database.connect(root)
    assert run.info.status == "FINISHED"
    assert run.info.start_time / 1000 == datetime.fromisoformat("2026-01-02T03:04:05+00:00").timestamp()
    assert run.info.end_time - run.info.start_time == 60500
    assert run.data.params == {"optimizer.lr": "0.1"}
    expected = {
        "stage": "train",
        "run": "copy",
        "seed": "1",
        "fingerprint": "train-copy-1",
        "git_dirty": "false",
    }
    expected |= {"versions.torch": "2.15.0", "machine.cores": "2", "dvc.stage": "train"}
    expected |= {"dvc.exp": "muddy-wolf"}
    assert expected.items() <= run.data.tags.items()
    assert store.client.get_run(run.data.tags["mlflow.parentRunId"]).info.run_name == study
    history = {key: store.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    points = {key: [(point.step, point.value) for point in found] for key, found in history.items()}
    assert points == {
        "task_loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)],
        "learning_rate": [(1, 0.1), (2, 0.1), (3, 0.1)],
        "validation_accuracy": [(1, 0.1), (3, 0.3)],
        "parameters": [(3, 1000)],
        "epochs": [(3, 3)],
        "seconds": [(0, 60.5)],
        "peak_memory_mb": [(0, 512.0)],
    }
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["split"]
    assert "run" not in runs["evaluate"].data.tags


def test_a_study_is_brought_in_alone(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path
) -> None:
    record()
    other = f"{study}_other"
    shutil.copytree(tmp_path / "metrics" / study, tmp_path / "metrics" / other)
    assert tracking.sync(tmp_path / "metrics", root, study=other).imported == ("train-copy-0",)
    assert (len(shown(root, study)), len(shown(root, other))) == (0, 1)
    assert tracking.sync(tmp_path / "metrics", root).present == 1
    assert (len(shown(root, study)), len(shown(root, other))) == (1, 1)


def test_a_lost_database_is_rebuilt(
    record: Callable[..., Path],
    root: Path,
    study: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    record()
    live(root, study)
    assert tracking.sync(tmp_path / "metrics", root).imported == ()
    other = tmp_path_factory.mktemp("rebuilt")
    (other / "mlflow.db").touch()  # what SQLite leaves when a database goes under a run
    shutil.copy(root / "mlflow.db-wal", other)  # the log of the database that has gone
    assert (other / "mlflow.db-wal").stat().st_size > 0
    assert tracking.sync(tmp_path / "metrics", other).imported == ("train-copy-0",)
    assert len(shown(other, study)) == 1
    with sqlite3.connect(other / "mlflow.db") as connection:
        assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    connection.close()
    assert tracking.sync(tmp_path / "metrics", other).imported == ()


def test_a_live_run_and_its_record_are_one(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path
) -> None:
    run_id = live(root, study)
    record()
    report = tracking.sync(tmp_path / "metrics", root)
    assert (report.imported, report.present, report.tagged) == ((), 1, ("train-copy-0",))
    (run,) = shown(root, study)
    assert run.info.run_id == run_id
    assert run.data.tags["versions.torch"] == "2.15.0"  # what only the record knows
    assert tracking.sync(tmp_path / "metrics", root).tagged == ()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=["failed", "killed"])
def test_a_run_that_did_not_finish_does_not_count(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path, error: BaseException
) -> None:
    live(root, study, error)
    record()
    assert tracking.sync(tmp_path / "metrics", root).imported == ("train-copy-0",)
    assert tracking.sync(tmp_path / "metrics", root).imported == ()
    statuses = Counter(run.info.status for run in shown(root, study))
    assert statuses["FINISHED"] == 1
    assert statuses.total() == 2


@pytest.mark.parametrize(
    "change", [{"fingerprint": "new"}, {"seed": 7}, {"run": "scratch"}, {"stage": "probe"}]
)
def test_a_run_of_another_record_does_not_count(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    live(root, study, **change)
    record()
    assert tracking.sync(tmp_path / "metrics", root).imported == ("train-copy-0",)


def test_a_run_that_works_counts_until_its_process_has_gone(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path
) -> None:
    store, me = database.connect(root), psutil.Process()
    record()
    with live_run(study=study, root=root, name="live", fingerprint="train-copy-0") as tracker:
        report = tracking.sync(tmp_path / "metrics", root)
        assert (report.imported, report.killed, report.present) == ((), (), 1)
        # The same process id, taken over by another process.
        store.client.set_tag(tracker.run_id, "process.started", str(me.create_time() - 3600))
        # What another machine's process does cannot be seen from here.
        store.client.set_tag(tracker.run_id, "process.host", f"not-{socket.gethostname()}")
        assert tracking.sync(tmp_path / "metrics", root).killed == ()
        store.client.set_tag(tracker.run_id, "process.host", socket.gethostname())
        report = tracking.sync(tmp_path / "metrics", root)
        assert (report.imported, report.killed) == (("train-copy-0",), ("live",))


def test_hashes_of_the_lock_file_become_tags(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path
) -> None:
    live(root, study)
    for seed in range(2):
        record(seed=seed)
    lock = tmp_path / "studies" / "dvc.lock"
    lock.parent.mkdir()
    stages = "".join(
        f"""
  train@copy-{seed}:
    cmd: python -m pipeline.train
    deps:
    - {{path: src/losses.py, hash: md5, md5: dep{seed}, size: 1}}
    outs:
    - {{path: metrics/{study}/train/copy/{seed}, hash: md5, md5: out{seed}.dir, size: 1}}"""
        for seed in range(2)
    )
    lock.write_text(f"schema: '2.0'\nstages:{stages}\n")
    report = tracking.sync(tmp_path / "metrics", root=root, locks={})
    assert report.imported == ("train-copy-1",)
    lock_at_root = {study: [lock]}
    # Paths are relative to the folder that the stages run in, here the parent of the lock's.
    (tmp_path / "studies" / "metrics").symlink_to(tmp_path / "metrics")
    report = tracking.sync(tmp_path / "metrics", root, lock_at_root)
    assert report.tagged == ("train-copy-0", "train-copy-1")
    for run in shown(root, study):
        seed = run.data.tags["seed"]
        assert run.data.tags["dvc.stage"] == f"train@copy-{seed}"
        assert run.data.tags["dvc.dep.src/losses.py"] == f"dep{seed}"
        assert run.data.tags[f"dvc.out.metrics/{study}/train/copy/{seed}"] == f"out{seed}.dir"
    assert tracking.sync(tmp_path / "metrics", root, lock_at_root).tagged == ()


def test_an_import_cut_short_is_made_anew(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record()
    client_type = type(database.connect(root).client)

    def fault(*_: object, **__: object) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(client_type, "log_batch", fault)
        with pytest.raises(StudyError, match="ConnectionError: away"):
            tracking.sync(tmp_path / "metrics", root)
    (half,) = shown(root, study)
    assert half.info.status == "RUNNING"
    database.connect(root).client.set_tag(half.info.run_id, "process.pid", str(2**22 + 1))  # gone
    report = tracking.sync(tmp_path / "metrics", root)
    assert (report.imported, report.killed) == (("train-copy-0",), ("train-copy-0",))
    assert sorted(run.info.status for run in shown(root, study)) == ["FINISHED", "KILLED"]


def test_a_dead_server_is_an_error_with_a_remedy(
    record: Callable[..., Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    with pytest.raises(StudyError, match="MLFLOW_TRACKING_URI") as raised:
        tracking.sync(tmp_path / "metrics", root)
    assert "secret" not in str(raised.value)


DAMAGES = [
    ("run.json", "{", "is damaged"),
    ("run.json", "{}", "is damaged"),
    ("run.json", json.dumps({files.DIGEST: files.fingerprint({})}), "lacks fingerprint"),
    ("metrics.json", "[", "is damaged"),
    ("curve.csv", "epoch,loss\n1,high\n", "is damaged"),
    ("curve.csv", "loss\n1\n", "is damaged"),
    ("curve.csv", "epoch,loss\n1,2,3\n", "is damaged"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_and_nothing_is_imported(
    record: Callable[..., Path], root: Path, study: str, tmp_path: Path, damage: tuple[str, str, str]
) -> None:
    file, text, message = damage
    record(seed=0)
    damaged = record(seed=1) / file
    damaged.write_text(text)
    with pytest.raises(StudyError, match=message) as raised:
        tracking.sync(tmp_path / "metrics", root)
    assert raised.value.where == str(damaged)
    assert shown(root, study) == []


def test_the_ui_opens_the_store_of_the_study(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StudyError, match="cannot be listened on"):
            tracking.serve(root, port=port)
    assert started == []
    tracking.serve(root, port=port)
    ((_, command, environment),) = started
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--backend-store-uri"] == f"sqlite:///{root / 'mlflow.db'}"
    assert (options["--host"], options["--port"], options["--workers"]) == ("127.0.0.1", str(port), "1")
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    with pytest.raises(StudyError, match="a server already"):
        tracking.serve(root, port=port)
