"""What a run holds, the same for a live and an imported one: tags, params and inputs."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import psutil

from attention_transfer.tracking.database import Store

SMALL_BATCH = 100  # MLflow's limit of params, and of tags, in one call
NOTE = "mlflow.note.content"
"""Tag that the UI shows as a run's description, as Markdown."""
DIGEST = 36  # MLflow's limit of a data set's digest


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as dotted names and text: `{"a": {"b": [1]}}` is `{"a.b": "[1]"}`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def run_tags(
    *,
    study: str,
    stage: str,
    fingerprint: str,
    run: str | None,
    seed: int | None,
    git_revision: str | None,
    git_dirty: bool | None,
) -> dict[str, str]:
    """The tags by which a run is found, the same for a live and an imported one; None is left out."""
    tags = {
        "kind": "stage",
        "study": study,
        "stage": stage,
        "dvc.stage": stage,  # the instance takes its place where it is known: train@copy-0
        "fingerprint": fingerprint,
        "run": run,
        "seed": None if seed is None else str(seed),
        "git_revision": git_revision,
        "git_dirty": None if git_dirty is None else json.dumps(git_dirty),
        "mlflow.source.git.commit": git_revision,  # the one that the UI shows
    }
    return {key: value for key, value in tags.items() if value is not None}


def note(record: Mapping[str, Any]) -> str:
    """A run's description: the DVC stage that made it and, of a training, its recipe."""
    stage = record.get("dvc", {}).get("stage")
    lines = [f"DVC stage `{stage}`. Again: `dvc repro --single-item --force {stage}`"] if stage else []
    if recipe := record["params"].get("runs", {}).get(record.get("run")):
        lines += ["", "| param | value |", "|:--|:--|"]
        lines += [f"| {key} | {value} |" for key, value in flatten(recipe).items() if value != "null"]
    return "\n".join(lines)


def process_tags() -> dict[str, str]:
    """What tells later whether the process that made a run is still the one with this id."""
    process = psutil.Process()
    return {
        "process.host": socket.gethostname(),
        "process.pid": str(process.pid),
        "process.started": str(process.create_time()),
    }


def log_params(store: Store, run_id: str, params: Mapping[str, Any]) -> None:
    """Logs params that the run does not have yet: MLflow refuses to change one."""
    from mlflow.entities import Param

    known = store.client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in flatten(params).items() if key not in known]
    for first in range(0, len(new), SMALL_BATCH):
        store.client.log_batch(run_id, params=new[first : first + SMALL_BATCH])


def log_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Sets tags, as few calls as MLflow allows."""
    from mlflow.entities import RunTag

    new = [RunTag(key, value) for key, value in tags.items()]
    for first in range(0, len(new), SMALL_BATCH):
        store.client.log_batch(run_id, tags=new[first : first + SMALL_BATCH])


def log_inputs(store: Store, run_id: str, inputs: Mapping[str, str]) -> None:
    """Logs each input as a data set: its name and the first characters of its digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    datasets = [
        DatasetInput(
            dataset=Dataset(name=name, digest=digest[:DIGEST], source_type="local", source=json.dumps(name)),
            tags=[InputTag("mlflow.data.context", "input")],
        )
        for name, digest in inputs.items()
    ]
    if datasets:
        store.client.log_inputs(run_id, datasets)
