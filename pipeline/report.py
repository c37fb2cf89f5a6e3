"""Builds the report: tables, figures, claims, and the page."""

from attention_transfer import stage
from attention_transfer.files import fingerprint, sha256
from attention_transfer.reporting import page


def main(this: stage.Stage) -> None:
    study, layout = this.study, this.layout

    def work() -> dict[str, float]:
        if study.report is not None:
            page.build(study, layout.metrics, layout.artifacts, layout.report)
            for path in sorted((layout.report / "figures").glob("*.png")):
                this.tracker.log_artifact(path)
            this.tracker.log_artifact(layout.report / "report.html")
        return {}

    records = sorted(path for path in (layout.metrics / "evaluate").glob("*.csv"))
    this.run(
        params={"report": None if study.report is None else study.report.model_dump(mode="json")},
        inputs={"records": fingerprint([sha256(path) for path in records])},
        work=work,
    )


if __name__ == "__main__":
    stage.main("report", main, __file__)
