"""Published image sets of shifts: ImageNet-V2, -A, -R, -Sketch, -C, ObjectNet, or whatever a study names."""

from __future__ import annotations

import numpy as np
import pandas as pd

from attention_transfer.config import PublishedSet, Report
from attention_transfer.reporting import tables
from attention_transfer.reporting.records import PUBLISHED, Records
from attention_transfer.reporting.tables import Table

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Published: AlexNet's mean error over the severities of ImageNet-C, by which corruption errors are divided
(Hendrycks & Dietterich, 2019, in the code beside the paper)."""


def table(records: Records, report: Report) -> Table | None:
    """Accuracy on each set, and beyond fine-tuning's; of ImageNet-C also the mean corruption error."""
    wanted = records.study.evaluation.published
    if not wanted:
        return None
    rows, shown = [], []
    for name, given in wanted.items():
        for run in records.study.runs:
            found = _accuracy(records, name, given, run)
            usual = _accuracy(records, name, given, report.finetune)
            if found is None or usual is None:
                continue
            accuracy, beyond = (tables.over_seeds(records, values) for values in (found, found - usual))
            row: dict[str, object] = {"set": name, "run": run, "seeds": accuracy.n}
            row |= tables.spread("accuracy", accuracy) | tables.spread("beyond_finetune", beyond)
            cells = {
                "set": name,
                "run": run,
                "seeds": str(accuracy.n),
                "accuracy, %": tables.per_cent(accuracy),
                "beyond fine-tune, points": tables.NONE
                if run == report.finetune
                else tables.per_cent(beyond),
            }
            if (errors := _corruption_error(records, name, given, run)) is not None:
                error = tables.over_seeds(records, errors)
                row |= tables.spread("mce", error)
                cells["mCE, %"] = tables.per_cent(error)
            rows.append(row)
            shown.append(cells)
    missing = [name for name in wanted if name not in {row["set"] for row in rows}]
    caption = (
        "Image sets that others have published as shifts of this task. A model is judged by its largest logit among "
        f"the classes that the set has. Mean over seeds and {tables.level(records)} interval; differences are paired "
        "by seed. mCE: error over corruptions, each divided by AlexNet's published one."
    )
    if missing:
        caption += f" Not there when the study ran, and left out: {', '.join(missing)}."
    columns = ["set", "run", "seeds"] if not rows else None
    return Table(
        "published", caption, pd.DataFrame(rows, columns=columns), pd.DataFrame(shown).fillna(tables.NONE)
    )


def _accuracy(records: Records, name: str, given: PublishedSet, run: str) -> np.ndarray | None:
    """One value a seed, over corruptions and severities where there are any; None where a part is missing."""
    parts = [_of(records, run, condition) for condition in _conditions(records, name, given)]
    found = [part for part in parts if part is not None]
    return np.asarray(np.mean(found, axis=0)) if len(found) == len(parts) else None


def _corruption_error(records: Records, name: str, given: PublishedSet, run: str) -> np.ndarray | None:
    """Mean over corruptions of error over AlexNet's, one value a seed; None for others than ImageNet-C's."""
    if not given.corruptions or not set(given.corruptions) <= set(ALEXNET_ERRORS):
        return None
    levels = records.study.evaluation.severities
    errors = []
    for corruption in given.corruptions:
        found = [_of(records, run, (f"{name}/{corruption}", level)) for level in levels]
        accuracy = np.mean(
            [part for part in found if part is not None], axis=0
        )  # whoever asks knows that all are there
        errors.append((1 - accuracy) / ALEXNET_ERRORS[corruption])
    return np.asarray(np.mean(errors, axis=0))


def _conditions(records: Records, name: str, given: PublishedSet) -> list[tuple[str, int]]:
    if not given.corruptions:
        return [(name, 0)]
    levels = records.study.evaluation.severities
    return [(f"{name}/{corruption}", level) for corruption in given.corruptions for level in levels]


def _of(records: Records, run: str, condition: tuple[str, int]) -> np.ndarray | None:
    """One value a seed."""
    rows = [(run, seed, PUBLISHED, *condition) for seed in records.study.seeds]
    accuracies = records.scores["accuracy"]
    if not all(row in accuracies.index for row in rows):
        return None
    return accuracies.loc[rows].to_numpy(float)
