"""What the intervals of the main comparison leave out: other teachers of the same recipe, other draws of the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from attention_transfer.config import Report
from attention_transfer.evaluation.variance import variance_components
from attention_transfer.reporting.experiment_claims import DRAWS, TEACHERS, replicated
from attention_transfer.reporting.experiments import Experiment, accuracies
from attention_transfer.reporting.records import Records
from attention_transfer.reporting.tables import Table

EFFECTS = (("finetune", "scratch"), ("copy", "scratch"), ("distill", "finetune"))


def table(records: Records, experiments: Sequence[Experiment], report: Report) -> Table | None:
    """Variance of the main differences between teachers, draws and student seeds; None where a run is missing.

    Runs of the main comparison stand for the first teacher and draw, whatever they are called.
    """
    own = {
        "scratch": report.scratch,
        "finetune": report.finetune,
        "copy": report.copied,
        "distill": report.distilled,
    }
    of = accuracies(records, list(experiments))

    def accuracy(method: str, teacher: str, draw: int) -> dict[int, float]:
        name = replicated(method, teacher, draw)
        return dict(of(own.get(name, name)))

    cells = {
        (method, teacher, draw): accuracy(method, teacher, draw)
        for method in own
        for teacher in TEACHERS
        for draw in DRAWS
    }
    seeds = sorted(set.intersection(*(set(found) for found in cells.values())))
    if len(seeds) < 2:
        return None
    rows = []
    for first, second in EFFECTS:
        values = np.array(
            [
                [[cells[first, t, d][seed] - cells[second, t, d][seed] for seed in seeds] for d in DRAWS]
                for t in TEACHERS
            ]
        )
        found = variance_components(values)
        here = values[0, 0]
        rows.append(
            {
                "effect": f"{first} − {second}",
                "mean": found.mean,
                "standard_error": found.standard_error,
                "main_mean": here.mean(),
                "main_standard_error": here.std(ddof=1) / math.sqrt(len(seeds)),
                **{
                    f"deviation_{name}": math.sqrt(getattr(found.truncated, name))
                    for name in ("teacher", "draw", "interaction", "seed")
                },
            }
        )
    frame = pd.DataFrame(rows)
    points = (100 * frame.drop(columns="effect")).map("{:.2f}".format)
    shown = pd.DataFrame(
        {
            "effect": frame["effect"],
            "mean over all, points": points["mean"],
            "its standard error": points["standard_error"],
            "main comparison, points": points["main_mean"],
            "its standard error over seeds": points["main_standard_error"],
            "deviation between teachers": points["deviation_teacher"],
            "between draws": points["deviation_draw"],
            "of both together": points["deviation_interaction"],
            "between seeds": points["deviation_seed"],
        }
    )
    caption = (
        f"{len(TEACHERS)} teachers x {len(DRAWS)} draws of the labels x {len(seeds)} seeds: where the main differences "
        "vary. The first standard error is for new teachers, draws and seeds together, the second for new seeds alone, "
        "as the intervals of all other tables are."
    )
    return Table("replication", caption, frame, shown)
