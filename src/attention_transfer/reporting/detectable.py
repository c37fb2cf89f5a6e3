"""What the seeds of a study can resolve, judged before its runs by the spread of seeds in a study that has run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from attention_transfer.config import Report, Run, Study
from attention_transfer.evaluation.power import seeds_needed, smallest_detectable_difference
from attention_transfer.reporting import claims
from attention_transfer.reporting.contrasts import Contrast, difference
from attention_transfer.reporting.experiment_claims import CONTRASTS
from attention_transfer.reporting.records import Records
from attention_transfer.reporting.tables import Table

POWER, SIGNIFICANCE = 0.8, 0.05
AIM = 0.01
"""Accuracy: a difference worth finding, and the margin within which two count as equal."""


def table(study: Study, experiments: Mapping[str, Study], pilot: Records) -> Table:
    """For each claim of the study and its experiments the difference that its seeds find four times in five.

    A claim's effect is a weighted sum of accuracies. Its standard deviation over seeds is taken to be that of
    independent runs, each with the spread that its method has in the pilot; a method that the pilot lacks has the
    largest spread there. Pairing by seed can only be counted on once it is measured.
    """
    spread = _spread(pilot)
    runs: dict[str, Run] = dict(study.runs)
    seeds = {run: set(study.seeds) for run in study.runs}
    for experiment in experiments.values():
        runs |= experiment.runs
        seeds |= {run: set(experiment.seeds) for run in experiment.runs}
    rows = []
    for contrast in [*_main(study.report), *CONTRASTS]:
        if contrast.weights.keys() <= runs.keys():
            variance = sum(
                (weight * spread.get(runs[run].method, max(spread.values()))) ** 2
                for run, weight in contrast.weights.items()
            )
            shared = len(set.intersection(*(seeds[run] for run in contrast.weights)))
            rows.append(_row(contrast.id, contrast.formula, math.sqrt(variance), shared))
    caption = (
        f"The smallest true difference that a two-sided paired t test at {SIGNIFICANCE:g} finds with a probability of "
        f"{POWER:g}, and the seeds that a difference of {100 * AIM:g} point would need. Standard deviations over "
        f"seeds are those of study {pilot.study.name}: "
        + ", ".join(f"{method} {100 * value:.2f}" for method, value in spread.items())
        + " points."
    )
    frame = pd.DataFrame(rows)
    return Table("detectable", caption, frame, _shown(frame))


def _spread(pilot: Records) -> dict[str, float]:
    """Standard deviation of test accuracy over seeds, by method; of several runs of a method the root mean square."""
    found: dict[str, list[float]] = {}
    for name, run in pilot.study.runs.items():
        found.setdefault(run.method, []).append(float(pilot.values("accuracy", name).var(ddof=1)))
    return {method: math.sqrt(float(np.mean(values))) for method, values in found.items()}


def _main(report: Report | None) -> Sequence[Contrast]:
    """The main claims on single models, as sums of accuracies."""
    if report is None:
        return ()
    half = claims.MOST_OF_THE_GAP
    beyond = {report.copied: 1.0, report.scratch: half - 1, report.finetune: -half}
    weights = {
        "main/pretraining_helps": difference(report.finetune, report.scratch),
        "main/copy": beyond,
        "main/distill": difference(report.distilled, report.finetune),
    }
    return [
        Contrast(name, claims.CLAIMS[name], claims.PUBLISHED[name], each, "above")
        for name, each in weights.items()
    ]


def _row(claim: str, formula: str, deviation: float, seeds: int) -> dict[str, object]:
    return {
        "claim": claim,
        "effect": formula,
        "standard_deviation": deviation,
        "seeds": seeds,
        "smallest_detectable": smallest_detectable_difference(
            deviation, seeds, power=POWER, significance=SIGNIFICANCE
        ),
        "seeds_for_aim": seeds_needed(AIM, deviation, power=POWER, significance=SIGNIFICANCE),
    }


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "claim": frame["claim"],
            "seeds": frame["seeds"].map(str),
            "its standard deviation, points": (100 * frame["standard_deviation"]).map("{:.2f}".format),
            "smallest detectable, points": (100 * frame["smallest_detectable"]).map("{:.2f}".format),
            f"seeds for {100 * AIM:g} point": frame["seeds_for_aim"].map(str),
        }
    )
