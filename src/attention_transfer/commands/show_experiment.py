"""`show` of an experiment: the accuracies of its runs; the report of its study has the rest."""

from __future__ import annotations

from tabulate import tabulate

from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.evaluation.statistics import mean_interval
from attention_transfer.layout import Layout
from attention_transfer.reporting import experiments
from attention_transfer.reporting.tables import per_cent


def text(study: Study) -> str:
    """A line for each run, and where more is.

    Raises:
        StudyError: it has not been run, or the records of its evaluation are damaged.
    """
    base = study.name.partition("/")[0]
    confidence = study.evaluation.confidence
    rows = [
        [run, len(values), per_cent(mean_interval([*values.values()], confidence))]
        for run, values in accuracies(study).items()
    ]
    heading = f"test accuracy, % [{100 * confidence:g} %]"
    table = tabulate(
        rows, ["run", "seeds", heading], colalign=["left", "right", "right"], disable_numparse=True
    )
    graph = f"studies/{base}/dvc.yaml"
    return f"{table}\n\nIn the report of {base}: dvc repro --single-item {graph}:report"


def accuracies(study: Study) -> dict[str, dict[int, float]]:
    """Test accuracy by run and seed.

    Raises:
        StudyError: as `text`.
    """
    layout, name = Layout.of(study), study.name.partition("/")[2]
    if not experiments.have_run({name: study}, layout.metrics):
        raise StudyError(
            "has not been run", where=study.name, remedy=f"run: dvc repro studies/{study.name}/dvc.yaml"
        )
    (found,) = experiments.load({name: study}, layout.metrics)
    return {
        run: {int(seed): float(value) for seed, value in values.items()}
        for run, values in found.accuracy.items()
        if values
    }
