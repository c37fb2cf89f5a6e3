"""Builds the report: tables, figures, claims, and the page."""

from attention_transfer.stage import Stage, run_script

import sys
from pathlib import Path
from typing import Any

from attention_transfer import config, provenance, tracking
from attention_transfer.errors import StudyError
from attention_transfer.files import fingerprint, sha256
from attention_transfer.reporting import page, rules

UI = "http://127.0.0.1:5000"  # of `make ui`


def main(this: Stage) -> None:
    study, layout = this.study, this.layout

    def work() -> dict[str, Any]:
        layout.report.mkdir(parents=True, exist_ok=True)
        if study.report is not None:
            experiments = config.experiments(this.params_file)
            page.build(
                study,
                layout.metrics,
                layout.artifacts,
                layout.report,
                params=this.params_file,
                experiments=experiments,
                rules_fixed=dict(zip(rules.names(), provenance.last_changes(rules.FILE), strict=True)),
                ui={
                    name: tracking.links(UI, study.name, name) for name in (tracking.MAIN, *study.experiments)
                },
            )
            for path in sorted((layout.report / "figures").glob("*.png")):
                this.tracker.log_artifact(path)
            this.tracker.log_artifact(layout.report / "report.html")
        show_recorded_runs(study.name)
        return {}

    records = sorted(path for path in (layout.metrics / "evaluate").glob("**/*.csv"))
    this.run(
        params={
            "report": None if study.report is None else study.report.model_dump(mode="json"),
            "experiments": list(study.experiments),
        },
        inputs={"records": fingerprint([sha256(path) for path in records])},
        work=work,
        live=True,
        patience=0.0,  # its record comes after its own sync
    )


def show_recorded_runs(study: str) -> None:
    """Stages of a few seconds left their records only: now they are shown in MLflow, all at once."""
    try:
        tracking.sync(Path("metrics"), Path(), study=study)
    except StudyError as error:
        print(f"warning: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_script("report", main, __file__)
