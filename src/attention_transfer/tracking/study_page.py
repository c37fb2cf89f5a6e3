"""What a study's own run shows in MLflow: how to read it, its report, its forecast."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attention_transfer.files import sha256
from attention_transfer.tracking import views
from attention_transfer.tracking.contents import NOTE, log_tags
from attention_transfer.tracking.database import Store

REPORT = ("report.html", "report.md", "claims.json")
FORECAST = "forecast.txt"


def show(store: Store, study: str, run_id: str, root: Path, experiments: Iterable[str]) -> None:
    """Notes what the study is, and keeps the newest report and forecast as artifacts of its run.

    Args:
        root: repository; read are reports/<study> and runs/<study>.
        experiments: those with runs, views.MAIN for those of none.
    """
    tags = store.client.get_run(run_id).data.tags
    fresh = {NOTE: _note(study, experiments, store.experiment)}
    files = [root / "reports" / study / name for name in REPORT] + [root / "runs" / study / FORECAST]
    for path in filter(Path.is_file, files):
        key, digest = f"artifact.{path.name}", sha256(path)[:12]
        if tags.get(key) != digest:
            store.client.log_artifact(run_id, str(path))
            fresh[key] = digest
    if fresh.items() - tags.items():
        log_tags(store, run_id, fresh)


def _note(study: str, experiments: Iterable[str], mlflow_experiment: str) -> str:
    """Markdown; links are relative to the UI, wherever it is served."""
    lines = [
        f"Study **{study}**, one run for each stage. Its report is among the artifacts: `{REPORT[0]}`.",
        f"Again: `make study STUDY={study}`.",
        "",
        *(
            f"- [{title}]({address})"
            for experiment in experiments
            for title, address in views.links("", study, experiment, mlflow_experiment).items()
        ),
    ]
    return "\n".join(lines)
