"""Makes the MLflow view whole from the records, which are the truth; a second time does nothing."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from tqdm import tqdm

from attention_transfer import files, run_record, yaml_files
from attention_transfer.errors import StudyError, repro
from attention_transfer.layout import Layout
from attention_transfer.tracking import study_page, views
from attention_transfer.tracking.contents import (
    NOTE,
    flatten,
    log_inputs,
    log_params,
    log_tags,
    note,
    process_tags,
    run_tags,
)
from attention_transfer.tracking.database import Store, address, connect, redacted, study_run
from attention_transfer.tracking.results import Accuracies, cost
from attention_transfer.tracking.results import accuracies as read_accuracies
from attention_transfer.tracking.runs import BATCH

SAME_PROCESS_SECONDS = 5.0  # a corrected clock moves a process's start time; a reused id is much further off
RECORDED = ("study", "stage", "run", "seed", "fingerprint")  # tags that say which record a run shows

MODEL = "model"  # tag of a training's run: MLflow's id of the model that it has left

Key = tuple[str | None, ...]


@dataclass(frozen=True)
class SyncReport:
    """What `sync` did.

    Attributes:
        imported: names of the runs that were missing.
        present: how many records the store showed already.
        killed: names of the runs found RUNNING without their process.
        tagged: names of the runs that got tags or metrics which they lacked, of lock file, record or later stages.
    """

    imported: tuple[str, ...]
    present: int
    killed: tuple[str, ...]
    tagged: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.imported)} runs brought into MLflow", f"{self.present} were there"]
        if self.killed:
            parts.append(f"marked as killed: {', '.join(self.killed)}")
        if self.tagged:
            parts.append(f"{len(self.tagged)} got tags or results that they lacked")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Record:
    study: str
    name: str
    content: Mapping[str, Any]
    points: Mapping[tuple[str, int], float]  # (metric, epoch) -> value
    results: Mapping[str, float]  # metrics that a live run does not know
    tags: Mapping[str, str]  # likewise

    @property
    def key(self) -> Key:
        values = {**self.content, "study": self.study}
        return tuple(None if values.get(tag) is None else str(values[tag]) for tag in RECORDED)


def sync(
    metrics: Path, root: Path, locks: Mapping[str, Sequence[Path]] | None = None, study: str = "*"
) -> SyncReport:
    """Imports every recorded run that the store does not show, and marks dead runs KILLED.

    A record is shown by a run of the same study, stage, run, seed and fingerprint that is FINISHED, or
    RUNNING in a living process. One that failed or was killed does not count.

    Args:
        metrics: folder of `<study>/**/run.json`, with metrics.json and curve.csv beside them.
        root: repository; the default store lies in DVC_ROOT, or here. Paths in locks are relative to
            it or to the lock file.
        locks: dvc.lock of each study that has one, and of its experiments; their hashes become tags
            `dvc.out.<path>`, `dvc.dep.<path>`.
        study: import the records of this study only; all of them where it is "*".

    Raises:
        StudyError: a record is damaged, the store does not answer, or MLflow is not installed.
    """
    # Records first: a run that ends in between is then already in the store.
    records = _read_records(metrics, root, locks or {}, study)
    try:
        store = connect(root)
        with FileLock(store.folder / ".mlflow.sync.lock", timeout=600):
            return _sync(store, records, metrics.parent)
    except ImportError as error:
        raise StudyError(
            f"MLflow cannot be loaded: {error}",
            where="sync",
            remedy='install it: pip install "attention-transfer[study]"',
        ) from error
    except Exception as error:  # mlflow, SQLAlchemy and the network each raise their own
        raise StudyError(
            f"MLflow fails: {redacted(f'{type(error).__name__}: {error}')[:300]}",
            where=redacted(address(root)),
            remedy="start the server that MLFLOW_TRACKING_URI names, or unset that variable; where mlflow.db"
            " itself is broken, delete it. Then sync again: nothing is lost and nothing is imported twice",
        ) from error


def _sync(store: Store, records: list[_Record], root: Path) -> SyncReport:
    shown: dict[Key, Any] = {}
    killed = []
    for run in store.search("tags.kind = 'stage'"):
        if run.info.status == "RUNNING" and _is_dead(run.data.tags):
            store.client.set_terminated(run.info.run_id, "KILLED")
            killed.append(run.info.run_name)
        elif run.info.status in {"FINISHED", "RUNNING"}:
            shown[tuple(run.data.tags.get(tag) for tag in RECORDED)] = run
    imported, tagged = [], []
    parents = {name: study_run(store, name) for name in sorted({record.study for record in records})}
    for record in tqdm(records, desc="MLflow", unit="run", delay=2, mininterval=1):
        if (found := shown.get(record.key)) is None:
            _import(store, record, parents[record.study])
            imported.append(record.name)
            continue
        tags = record.tags.items() - found.data.tags.items()
        results = record.results.items() - found.data.metrics.items()
        if tags:
            log_tags(store, found.info.run_id, record.tags)
        if results:
            _log_results(store, found.info.run_id, dict(results))
        if tags or results:
            tagged.append(record.name)
        if MODEL not in found.data.tags:
            _log_model(store, found.info.run_id, record)
    for name, parent in parents.items():
        trained = {
            record.tags["experiment"]
            for record in records
            if record.study == name and record.content["stage"] == "train"
        }
        views.save(store, name, sorted(trained))
        study_page.show(store, name, parent, root, sorted(trained))
    return SyncReport(tuple(imported), len(records) - len(imported), tuple(killed), tuple(tagged))


def _is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the process that made a run has gone; False for another machine's, which cannot be seen."""
    here = process_tags()
    if not tags.keys() >= here.keys() or tags["process.host"] != here["process.host"]:
        return False
    try:
        process = psutil.Process(int(tags["process.pid"]))
        started = process.create_time()
        gone = process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    return gone or abs(started - float(tags["process.started"])) > SAME_PROCESS_SECONDS


def _import(store: Store, record: _Record, parent: str) -> None:
    """Makes a FINISHED run; one cut short is RUNNING without a process, so the next sync makes it anew."""
    from mlflow.entities import Metric

    content = record.content
    begin = int(datetime.fromisoformat(content["started"]).timestamp() * 1000)
    end = begin + int(content["seconds"] * 1000)
    tags = {
        **run_tags(
            study=record.study,
            stage=content["stage"],
            fingerprint=content["fingerprint"],
            run=content.get("run"),
            seed=content.get("seed"),
            git_revision=content["git_revision"],
            git_dirty=content["git_dirty"],
        ),
        **record.tags,
        **process_tags(),
        "mlflow.parentRunId": parent,
        "imported": datetime.fromtimestamp(int(time.time())).isoformat(),
    }
    created = store.client.create_run(store.experiment, start_time=begin, run_name=record.name, tags=tags)
    run_id = created.info.run_id
    log_params(store, run_id, content["params"])
    log_inputs(store, run_id, content.get("inputs", {}))
    points = [Metric(name, value, end, epoch) for (name, epoch), value in record.points.items()]
    for first in range(0, len(points), BATCH):
        store.client.log_batch(run_id, metrics=points[first : first + BATCH])
    _log_results(store, run_id, record.results)
    _log_model(store, run_id, record)
    store.client.set_terminated(run_id, "FINISHED", end_time=end)


def _log_results(store: Store, run_id: str, results: Mapping[str, float]) -> None:
    """The newest value of a name is the one that MLflow shows."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    store.client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in results.items()])


def _log_model(store: Store, run_id: str, record: _Record) -> None:
    """Names the weights that a training has left; they stay where DVC keeps them."""
    from mlflow.entities import LoggedModelOutput

    content, experiment = record.content, record.tags["experiment"]
    if content["stage"] != "train" or None in (content.get("run"), content.get("seed")):
        return
    study = record.study if experiment == views.MAIN else f"{record.study}/{experiment}"
    tags = {
        "study": record.study,
        "experiment": experiment,
        "weights": str(Layout(study).student(content["run"], content["seed"]) / "model.safetensors"),
        "fingerprint": content["fingerprint"],
    }
    name = f"{content['run']}-{content['seed']}"
    model = store.client.create_logged_model(store.experiment, name, source_run_id=run_id, tags=tags)
    store.client.finalize_logged_model(model.model_id, "READY")
    store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    log_tags(store, run_id, {MODEL: model.model_id})


def _read_records(
    metrics: Path, root: Path, locks: Mapping[str, Sequence[Path]], study: str
) -> list[_Record]:
    stages = {
        study: {path: tags for lock in of_study for path, tags in _read_lock(lock, root).items()}
        for study, of_study in locks.items()
    }
    records = []
    accuracies: dict[Path, Accuracies] = {}
    for path in sorted(metrics.glob(f"{study}/**/run.json")):
        name_of_study, *place = path.parent.relative_to(metrics).parts
        content = run_record.read(path.parent, made_by=place[0] if place else "")
        required = {"stage", "fingerprint", "params", "git_revision", "git_dirty", "started", "seconds"}
        if missing := sorted(required - content.keys()):
            raise StudyError(
                f"lacks {', '.join(missing)}",
                where=str(path),
                remedy=f"make it anew: {repro('@'.join(place[:1]), again=True)}",
            )
        details: dict[str, Any] = {
            name: content[name]
            for name in ("dvc", "versions", "machine", "paths", "peak_memory_mb")
            if name in content
        } | {"experiment": content.get("experiment", views.MAIN)}
        tags = {**flatten(details), **_lock_tags(stages.get(name_of_study, {}), path.resolve())}
        tags[NOTE] = note(content)
        name = "-".join(place) or content["stage"]
        points, results = _read_points(path.parent), {}
        if content["stage"] == "train":
            evaluate = metrics / name_of_study / "evaluate" / content.get("experiment", "")
            if evaluate not in accuracies:
                accuracies[evaluate] = read_accuracies(evaluate)
            results = dict(accuracies[evaluate].get((str(content.get("run")), str(content.get("seed"))), {}))
            results |= cost(
                content, next((value for (key, _), value in points.items() if key == "steps"), None)
            )
        records.append(_Record(name_of_study, name, content, points, results, tags))
    return records


def _read_points(folder: Path) -> dict[tuple[str, int], float]:
    """The metrics of each epoch from curve.csv, and those of metrics.json at the last epoch."""
    points: dict[tuple[str, int], float] = {}
    curve, summary = folder / "curve.csv", folder / "metrics.json"
    last = 0
    if curve.exists():
        try:
            with curve.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    last = int(row.pop("epoch"))
                    row.pop("step", None)  # counts optimiser steps: a position, not a result
                    points |= {(name, last): float(cell) for name, cell in row.items() if cell}
        except (KeyError, ValueError, TypeError) as error:
            raise StudyError(
                f"is damaged: {error!r}",
                where=str(curve),
                remedy="make it anew: python -m attention_transfer remake, with the name of its stage",
            ) from error
    if summary.exists():
        for name, text in flatten(files.read_json(summary, made_by="of its stage")).items():
            try:
                points[name, last] = float(text)
            except ValueError:
                continue  # a name or a list is no metric; the record keeps it
    return points


def _read_lock(lock: Path, root: Path) -> dict[Path, dict[str, str]]:
    """Tags of the stage that makes each output of a dvc.lock."""
    try:
        stages = (yaml_files.load(lock) or {}).get("stages", {})
    except (OSError, yaml_files.YAMLError, AttributeError) as error:
        raise StudyError(
            f"cannot be read: {error}", where=str(lock), remedy="restore it from git, or run dvc repro"
        ) from error
    tags = {}
    for name, stage in stages.items():
        own = {"dvc.stage": name}
        for kind in ("dep", "out"):
            own |= {
                f"dvc.{kind}.{item['path']}": item["md5"]
                for item in stage.get(f"{kind}s", ())
                if "md5" in item
            }
        for item in stage.get("outs", ()):
            for base in (root, lock.parent):
                tags[(base / item["path"]).resolve()] = own
    return tags


def _lock_tags(stages: Mapping[Path, Mapping[str, str]], record: Path) -> Mapping[str, str]:
    """The tags of the stage whose output is the record or a folder around it."""
    return next((stages[path] for path in (record, *record.parents) if path in stages), {})
