"""How good an exported model is, from the study's records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from attention_transfer import run_record
from attention_transfer.errors import StudyError, repro
from attention_transfer.evaluation import predictions
from attention_transfer.evaluation.statistics import Interval, mean_interval
from attention_transfer.exporting.subject import TUTOR, Subject
from attention_transfer.files import read_json, read_sealed
from attention_transfer.reporting import records

_COLUMNS = ["run", "seed", "set", "shift", "severity", "examples", "accuracy", "nll", "ece"]
_ROUNDED = 1e-6  # scores.csv has six decimals


@dataclass(frozen=True)
class Accuracy:
    """On one set of images; all values are fractions.

    Attributes:
        images: `test`, `validation` or `shifts`, whose accuracy is the mean over shifts and severities.
        examples: number of images.
        value: of the exported model.
        low, high: Wilson's interval of `value` over images; None for shifts, whose images are the same ones.
        seeds: mean over the run's seeds with Student's t interval; None for a fine-tuned teacher.
        nll, ece: mean cross-entropy in nats, expected calibration error; None where no logits are kept.
    """

    images: str
    examples: int
    value: float
    low: float | None
    high: float | None
    seeds: Interval | None = None
    nll: float | None = None
    ece: float | None = None


def read(subject: Subject) -> list[Accuracy]:
    """The test set first, if the study evaluates on it.

    Raises:
        StudyError: a record is missing or damaged, or not of the predictions that lie there.
    """
    if not subject.is_student:
        return [_of_tutor(subject)]
    stage = subject.made_by("evaluate")
    folder = subject.layout.record("evaluate")
    run_record.read(folder, made_by=stage)
    table = records.read_table(folder / "scores.csv", stage, _COLUMNS)
    table = table[table["run"] == subject.name]
    sets = subject.study.evaluation.sets
    found = [_on(subject, table, which) for which in ("test", "validation") if which in sets]
    return found + ([_shifted(subject, table)] if "shifts" in sets else [])


def _of_tutor(subject: Subject) -> Accuracy:
    stage = subject.made_by("finetuned")
    path = subject.layout.record("finetuned") / "metrics.json"
    value = read_json(path, made_by=stage).get(f"{subject.name}_validation_accuracy")
    if value != read_sealed(subject.folder / TUTOR, made_by=stage)["validation_accuracy"]:
        raise StudyError(
            f"has another accuracy of {subject.name} than was measured",
            where=str(path),
            remedy=f"make it anew: {repro(stage, again=True)}",
        )
    return _counted(subject, "validation", value, subject.study.data.validation)


def _counted(subject: Subject, images: str, value: float, examples: int, **more: Any) -> Accuracy:
    interval = binomtest(round(value * examples), examples).proportion_ci(
        subject.study.evaluation.confidence, method="wilson"
    )
    return Accuracy(images, examples, value, float(interval.low), float(interval.high), **more)


def _on(subject: Subject, table: pd.DataFrame, which: str) -> Accuracy:
    rows = table[table["set"] == which].set_index("seed")
    own = _row(subject, rows, which)
    file = subject.layout.predictions(subject.name, subject.seed) / f"{which}.safetensors"
    stored = predictions.load(file, made_by=subject.made_by(f"predict@{subject.name}-{subject.seed}"))
    if abs(float(stored.correct.double().mean()) - own["accuracy"]) > _ROUNDED:
        raise StudyError(
            "is not about the predictions that lie there",
            where=str(subject.layout.record("evaluate") / "scores.csv"),
            remedy=f"evaluate them: {repro(subject.made_by('evaluate'))}",
        )
    return _counted(
        subject,
        which,
        float(own["accuracy"]),
        int(own["examples"]),
        seeds=_over_seeds(subject, rows["accuracy"]),
        nll=float(own["nll"]),
        ece=float(own["ece"]),
    )


def _shifted(subject: Subject, table: pd.DataFrame) -> Accuracy:
    rows = table[table["set"] == "shifts"].groupby("seed").mean(numeric_only=True)
    own = _row(subject, rows, "shifts")
    examples, value = int(own["examples"]), float(own["accuracy"])
    return Accuracy(
        "shifts", examples, value, None, None, seeds=_over_seeds(subject, rows["accuracy"]),
        nll=float(own["nll"]), ece=float(own["ece"]),
    )  # fmt: skip


def _row(subject: Subject, rows: pd.DataFrame, which: str) -> pd.Series:
    if subject.seed not in rows.index:
        raise StudyError(
            f"has no row for run {subject.name}, seed {subject.seed}, set {which}",
            where=str(subject.layout.record("evaluate") / "scores.csv"),
            remedy=f"evaluate it: {repro(subject.made_by('evaluate'))}",
        )
    return rows.loc[subject.seed]


def _over_seeds(subject: Subject, values: pd.Series) -> Interval:
    return mean_interval(
        values[values.index.isin(subject.study.seeds)].tolist(), subject.study.evaluation.confidence
    )
