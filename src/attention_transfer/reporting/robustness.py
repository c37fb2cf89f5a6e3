"""Distribution shift at matched accuracy: against the baseline, and against the line that all models lie along."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import expit, logit

from attention_transfer.config import Report
from attention_transfer.evaluation.robustness import (
    CorruptionError,
    EffectiveRobustness,
    corruption_error,
    effective_robustness,
)
from attention_transfer.reporting import tables
from attention_transfer.reporting.figures import STYLE, WIDTH, Drawing, legend, looks
from attention_transfer.reporting.records import UNSHIFTED, Records
from attention_transfer.reporting.tables import Table

MODELS = 3
"""The fewest that a line is fitted to."""


def line(records: Records) -> EffectiveRobustness | None:
    """Mean accuracy over shifts, by that on the same images as they are: fitted to, and judged for, every model.

    Models are all runs and seeds of the main comparison, in the order of the runs. None where the study has no
    shifts, too few models, or models of one accuracy.
    """
    if "shifts" not in records.study.evaluation.sets or len(records.study.grid) < MODELS:
        return None
    clean, shifted = _accuracies(records)
    if np.ptp(clean) == 0:
        return None
    evaluation = records.study.evaluation
    images = evaluation.shift_images
    return effective_robustness(
        clean,
        shifted,
        clean,
        shifted,
        examples_in=images,
        examples_out=images * len(evaluation.shifts) * len(evaluation.severities),
    )


def residuals(records: Records, found: EffectiveRobustness) -> dict[str, np.ndarray]:
    """By run, one value a seed: accuracy under shift beyond the line, as a fraction."""
    values = np.array(found.residuals).reshape(len(records.study.runs), -1)
    return dict(zip(records.study.runs, values, strict=True))


def table(records: Records, report: Report) -> Table | None:
    """Corruption errors relative to scratch, and effective robustness."""
    found = line(records)
    if found is None:
        return None
    rows, shown = [], []
    for run, beyond in residuals(records, found).items():
        errors = _corruption_errors(records, run, report.scratch)
        over = {
            "mce": tables.over_seeds(records, [each.mean for each in errors]),
            "relative_mce": tables.over_seeds(records, [each.relative_mean for each in errors]),
            "effective_robustness": tables.over_seeds(records, beyond),
        }
        row: dict[str, object] = {"run": run, "seeds": len(records.study.seeds)}
        for name, interval in over.items():
            row |= tables.spread(name, interval)
        rows.append(row)
        shown.append(
            {
                "run": run,
                "seeds": str(len(records.study.seeds)),
                "mCE": tables.plain(over["mce"]),
                "relative mCE": tables.plain(over["relative_mce"]),
                "effective robustness, points": tables.per_cent(over["effective_robustness"]),
            }
        )
    caption = (
        "mCE and relative mCE: errors under shift, and their rise, as shares of those of "
        f"{report.scratch} with the same seed, mean over shifts (no relative mCE where {report.scratch} does not lose "
        f"under each of them). Effective robustness: accuracy under shift beyond the "
        f"line logit(shifted) = {found.slope:.2f} logit(clean) "
        f"{'−' if found.intercept < 0 else '+'} {abs(found.intercept):.2f} (R² {found.r2:.2f}), fitted to "
        f"all {found.models} models of this comparison: {', '.join(records.study.runs)}, every seed. Mean over seeds "
        f"and {tables.level(records)} interval."
    )
    return Table("robustness", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def figure(records: Records) -> Drawing | None:
    """Every model under shift, by its accuracy without."""
    found = line(records)
    if found is None:
        return None
    clean, shifted = (100 * values.reshape(len(records.study.runs), -1) for values in _accuracies(records))
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        axes = drawn.add_subplot()
        room = 0.15 * max(np.ptp(clean), 1.0)
        x = np.clip(np.linspace(clean.min() - room, clean.max() + room, 100), 0.1, 99.9)
        axes.plot(
            x,
            100 * expit(found.slope * logit(x / 100) + found.intercept),
            color="#555555",
            linewidth=1,
            zorder=1,
        )
        styles = looks(records.study)
        for (run, look), along, down in zip(styles.items(), clean, shifted, strict=True):
            axes.plot(
                along,
                down,
                look.marker,
                color=look.color,
                markersize=6,
                markeredgecolor="white",
                markeredgewidth=0.5,
                label=run,
                zorder=3,
            )
        axes.set_xlabel("accuracy on the same images without shift, %")
        axes.set_ylabel("mean accuracy over shifts, %")
        legend(drawn, styles)
    caption = (
        "Accuracy under shift against accuracy without: one point a model. The line is fitted to all of them on the "
        "scale of logits; what lies above it loses less than its accuracy predicts."
    )
    means = {
        run: np.array([np.mean(along), np.mean(down)])
        for run, along, down in zip(records.study.runs, clean, shifted, strict=True)
    }
    said = "; ".join(
        f"{run}: {along:.1f} without, {down:.1f} under shift" for run, (along, down) in means.items()
    )
    return Drawing("shift_scatter", caption, drawn, said=f"Means: {said}.")


def _accuracies(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Without and under shift, one value a run and seed, run by run."""
    runs = records.study.runs
    clean = np.concatenate([records.values("accuracy", run, UNSHIFTED) for run in runs])
    return clean, np.concatenate([records.all_shifts("accuracy", run) for run in runs])


def _corruption_errors(records: Records, run: str, baseline: str) -> list[CorruptionError]:
    """One a seed."""
    evaluation = records.study.evaluation
    errors = {
        name: np.array(
            [
                [1 - records.shifted("accuracy", name, shift, severity) for severity in evaluation.severities]
                for shift in evaluation.shifts
            ]
        )
        for name in (run, baseline)
    }
    clean = {name: 1 - records.values("accuracy", name, UNSHIFTED) for name in (run, baseline)}
    return [
        corruption_error(
            errors[run][..., place],
            errors[baseline][..., place],
            clean_error=float(clean[run][place]),
            baseline_clean_error=float(clean[baseline][place]),
        )
        for place in range(len(records.study.seeds))
    ]
