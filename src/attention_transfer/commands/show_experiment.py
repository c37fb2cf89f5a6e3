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
    layout = Layout.of(study)
    base, _, name = study.name.partition("/")
    if not experiments.have_run({name: study}, layout.metrics):
        raise StudyError(
            "has not been run", where=study.name, remedy=f"run: dvc repro studies/{study.name}/dvc.yaml"
        )
    (found,) = experiments.load({name: study}, layout.metrics)
    confidence = study.evaluation.confidence
    rows = [
        [run, len(values), per_cent(mean_interval([*values.values()], confidence))]
        for run, values in found.accuracy.items()
        if values
    ]
    heading = f"test accuracy, % [{100 * confidence:g} %]"
    table = tabulate(rows, ["run", "seeds", heading], tablefmt="github", disable_numparse=True)
    graph = f"studies/{base}/dvc.yaml"
    return f"{table}\n\nIn the report of {base}: dvc repro --single-item {graph}:report"
