"""The records of a study as pandas frames.

Rows are asked for by iterating over params.yaml, never by listing a folder: a run that was removed
from the study is gone from every table, and a record that is missing is an error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attention_transfer import run_record
from attention_transfer.config import SHIFTS, Study
from attention_transfer.errors import StudyError, repro
from attention_transfer.files import read_json

MEASURES = ("accuracy", "top5", "nll", "brier", "ece")
"""Columns of scores.csv that hold a measure; top5 may be empty."""
_SCORES = ["run", "seed", "set", "shift", "severity", "examples", *MEASURES]
_OOD = ["run", "seed", "set", "score", "auroc", "fpr95"]
_ENSEMBLES = [
    *("ensemble", "first", "first_seed", "second", "second_seed", "set", "accuracy"),
    *("first_accuracy", "second_accuracy", "gain", "disagreement", "error_consistency"),
]
_COMPARISONS = ["first", "second", "set", "shift", "difference", "low", "high", "seeds", "examples"]
_CALIBRATION = ["run", "seed", "temperature", "nll", "ece", "nll_scaled", "ece_scaled"]
SIMILARITY = [
    *("run", "seed", "reference", "layer"),
    *("cka", "divergence", "matched_divergence", "distance", "entropy", "on_objects"),
]
_CKA = ["run", "seed", "reference", "layer", "reference_layer", "cka"]
_CURVE = ["epoch", "step", "task_loss", "attention_loss", "learning_rate", "validation_accuracy"]
_SOME_CURVES = ("feature_loss", "logit_loss")

PUBLISHED = "published"  # sets of others; those that were not there when the study ran have no rows
UNSHIFTED = "unshifted"  # the very test images that are shifted, as they are


@dataclass(frozen=True)
class Records:
    """What a study measured; accuracies are fractions."""

    study: Study
    scores: pd.DataFrame
    """Indexed by (run, seed, set, shift, severity); columns examples and MEASURES."""
    curves: pd.DataFrame
    """One row per run, seed and epoch."""
    training: pd.DataFrame
    """One row per run and seed: metrics.json of the training."""
    ood: pd.DataFrame
    """Empty unless the study predicts on digits."""
    ensembles: pd.DataFrame
    """Test set only; one row per ensemble and pair of seeds, each pair of models once."""
    comparisons: pd.DataFrame
    calibration: pd.DataFrame
    """Test set, before and after temperature scaling; empty unless the study predicts on validation images too."""
    similarity: pd.DataFrame
    """One row per run, seed, reference (`teacher`, `finetune`) and layer."""
    cka: pd.DataFrame
    """One row per run, seed, reference, layer and layer of the reference."""
    probes: dict[str, dict[str, Any]]
    """By teacher, metrics.json of its probe, where it has been run."""
    recipes: dict[str, dict[str, Any]]
    """For each run the resolved params that its first seed recorded."""
    stages: pd.DataFrame
    """One row per stage instance: stage, seconds, peak_memory_mb."""
    provenance: list[dict[str, Any]]
    """run.json of every stage instance."""

    def require_whole(self, path: Path, stage: str) -> None:
        """StudyError unless a file outside the records is the one that a stage wrote."""
        recorded = next((run for run in self.provenance if run["stage"] == stage), {})
        run_record.require_whole(path, recorded, made_by=stage)

    def values(self, measure: str, run: str, image_set: str = "test") -> np.ndarray:
        """One value per seed, in the study's order of seeds; shape (seeds,)."""
        rows: list[tuple[Any, ...]] = [(run, seed, image_set, "", 0) for seed in self.study.seeds]
        return self._measured(measure, rows)

    def shifted(self, measure: str, run: str, shift: str, severity: int | None = None) -> np.ndarray:
        """One value per seed under one shift, at one severity or as mean over all; shape (seeds,)."""
        severities = self.study.evaluation.severities if severity is None else (severity,)
        rows: list[tuple[Any, ...]] = [
            (run, seed, "shifts", shift, level) for seed in self.study.seeds for level in severities
        ]
        return self._measured(measure, rows).reshape(len(self.study.seeds), len(severities)).mean(axis=1)

    def all_shifts(self, measure: str, run: str) -> np.ndarray:
        """One value per seed, the mean over all shifts and severities; shape (seeds,)."""
        return np.mean([self.shifted(measure, run, s) for s in self.study.evaluation.shifts], axis=0)

    def _measured(self, measure: str, rows: list[tuple[Any, ...]]) -> np.ndarray:
        return np.array([self._lookup[measure][row] for row in rows], dtype=float)

    @cached_property
    def _lookup(self) -> dict[str, dict[tuple[Any, ...], float]]:
        """Row to value, of every measure: tables ask for thousands, and a MultiIndex is slow at that."""
        return {measure: self.scores[measure].to_dict() for measure in MEASURES}

    def pairs(self, ensemble: str) -> pd.DataFrame:
        """The rows of one ensemble, indexed by the first member's seed."""
        return self.ensembles[self.ensembles.ensemble == ensemble].set_index("first_seed")


def load(study: Study, metrics: Path, *, maybe_unprobed: Collection[str] = ()) -> Records:
    """Reads every record that the report needs.

    Args:
        metrics: the study's folder of records.
        maybe_unprobed: teachers whose probe may not have been run.

    Raises:
        StudyError: a record is missing or damaged, or lacks a row that the study asks for.
    """
    runs = {
        (run, seed): _train(metrics / "train" / run / str(seed), f"train@{run}-{seed}")
        for run, seed in study.grid
    }
    evaluate = metrics / "evaluate"
    provenance = _stage_records(study, metrics)
    return Records(
        study=study,
        scores=_scores(study, evaluate / "scores.csv"),
        curves=pd.concat(
            [curve.assign(run=run, seed=seed) for (run, seed), (_, _, curve) in runs.items()],
            ignore_index=True,
        ),
        training=pd.DataFrame(
            [{"run": run, "seed": seed} | metrics for (run, seed), (metrics, _, _) in runs.items()]
        ),
        ood=_ood(study, evaluate / "ood.csv"),
        ensembles=_ensembles(study, evaluate / "ensembles.csv"),
        comparisons=_comparisons(study, evaluate / "comparisons.csv"),
        calibration=_calibration(study, evaluate / "calibration.csv"),
        similarity=_similarity(study, metrics / "similarity" / "layers.csv", SIMILARITY),
        cka=_similarity(study, metrics / "similarity" / "cka.csv", _CKA),
        probes={
            teacher: _probe(metrics / "probe" / teacher, teacher)
            for teacher in study.teachers
            if teacher not in maybe_unprobed or (metrics / "probe" / teacher).is_dir()
        },
        recipes={run: runs[run, study.seeds[0]][1]["params"] for run in study.runs},
        stages=pd.DataFrame(
            [{key: run[key] for key in ("stage", "seconds", "peak_memory_mb")} for run in provenance]
        ),
        provenance=provenance,
    )


def _probe(folder: Path, teacher: str) -> dict[str, Any]:
    stage = f"probe@{teacher}"
    read_run(folder, stage)
    found = read_json(folder / "metrics.json", made_by=stage)
    for key in ("knn_accuracy", "logistic_regression_accuracy", "effective_rank"):
        if not isinstance(value := found.get(key), int | float) or not math.isfinite(value):
            raise damaged(folder / "metrics.json", stage, f"has no {key}")
    return found


def _train(folder: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any], pd.DataFrame]:
    run = read_run(folder, stage)
    return (
        read_json(folder / "metrics.json", made_by=stage),
        run,
        read_table(folder / "curve.csv", stage, _CURVE, _SOME_CURVES),
    )


def _stage_records(study: Study, metrics: Path) -> list[dict[str, Any]]:
    """run.json of every stage; the instances of a stage are those that the study names.

    Only the stages themselves are listed from the folder: their names are dvc.yaml's, not params.yaml's.
    """
    instances = dict.fromkeys(
        [
            (),
            *((teacher,) for teacher in study.teachers),
            *((run,) for run in study.runs),
            *((run, str(seed)) for run, seed in study.grid),
        ]
    )
    found = []
    for stage in sorted(
        folder for folder in metrics.iterdir() if folder.is_dir() and folder.name != "report"
    ):
        for instance in instances:
            place = stage.joinpath(*instance)
            if (place / run_record.RUN).exists():
                name = "-".join(instance)
                found.append(read_run(place, f"{stage.name}@{name}" if name else stage.name))
    return found


def read_run(folder: Path, stage: str) -> dict[str, Any]:
    """run.json, with whole files beside it, and nothing lacking."""
    run = run_record.read(folder, made_by=stage)
    needed = (
        "stage",
        "params",
        "git_revision",
        "git_dirty",
        "versions",
        "machine",
        "seconds",
        "peak_memory_mb",
    )
    if missing := [key for key in needed if key not in run]:
        raise damaged(folder / run_record.RUN, stage, f"lacks {', '.join(missing)}")
    return run


def read_table(path: Path, stage: str, columns: list[str], optional: tuple[str, ...] = ()) -> pd.DataFrame:
    """These columns of a CSV; StudyError names the stage that makes it anew."""
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError as error:
        raise StudyError(
            "does not exist", where=str(path), remedy=f"run the stage that writes it: {repro(stage)}"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise damaged(path, stage, f"is no table: {error}") from error
    if missing := [column for column in columns if column not in frame]:
        raise damaged(path, stage, f"lacks the columns {', '.join(missing)}")
    return frame[columns + [column for column in optional if column in frame]]


def damaged(path: Path, stage: str, problem: str) -> StudyError:
    """A record that must be made anew by its stage."""
    return StudyError(problem, where=str(path), remedy=f"make it anew: {repro(stage, again=True)}")


def _scores(study: Study, path: Path) -> pd.DataFrame:
    keys = ["run", "seed", "set", "shift", "severity"]
    frame = read_table(path, "evaluate", _SCORES)
    frame = frame.assign(shift=frame["shift"].astype(object).fillna("")).set_index(keys).sort_index()
    conditions: list[tuple[str, str, int]] = [
        (s, "", 0) for s in ("validation", "test") if _predicts(study, s)
    ]
    if _predicts(study, "shifts"):
        conditions.append((UNSHIFTED, "", 0))
        conditions += [
            ("shifts", *pair)
            for pair in itertools.product(study.evaluation.shifts, study.evaluation.severities)
        ]
    if _predicts(study, PUBLISHED):
        # What is there for one run is there for all.
        conditions += sorted({tuple(index[2:]) for index in frame.index if index[2] == PUBLISHED})
    wanted = [(*row, *condition) for row in study.grid for condition in conditions]
    known = set(frame.index)
    for row in wanted:
        if row not in known:
            raise damaged(path, "evaluate", f"has no row for {_describe(keys, row)}")
    if frame.index.has_duplicates:
        twice = frame.index[frame.index.duplicated()][0]
        raise damaged(path, "evaluate", f"has two rows for {_describe(keys, twice)}")
    frame = frame.loc[wanted]
    if not np.isfinite(frame["accuracy"].to_numpy(float)).all():
        row = frame.index[~np.isfinite(frame["accuracy"].to_numpy(float))][0]
        raise damaged(path, "evaluate", f"has no accuracy for {_describe(keys, row)}")
    return frame


def _predicts(study: Study, image_set: str) -> bool:
    return image_set in study.evaluation.sets


def _describe(keys: list[str], row: tuple[Any, ...]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, row, strict=True) if value not in ("", 0))


def _ood(study: Study, path: Path) -> pd.DataFrame:
    if not _predicts(study, "digits"):
        return pd.DataFrame(columns=_OOD)
    return _of_every_run(study, path, _OOD)


def _calibration(study: Study, path: Path) -> pd.DataFrame:
    if not (_predicts(study, "validation") and _predicts(study, "test")):
        return pd.DataFrame(columns=_CALIBRATION)
    return _of_every_run(study, path, _CALIBRATION)


def _of_every_run(study: Study, path: Path, columns: list[str]) -> pd.DataFrame:
    """The rows of the study's runs and seeds, of which each has one at least."""
    frame = read_table(path, "evaluate", columns)
    frame = frame[[pair in study.grid for pair in zip(frame["run"], frame["seed"], strict=True)]]
    known = set(zip(frame["run"], frame["seed"], strict=True))
    for run, seed in study.grid:
        if (run, seed) not in known:
            raise damaged(path, "evaluate", f"has no row for run {run}, seed {seed}")
    return frame


def _ensembles(study: Study, path: Path) -> pd.DataFrame:
    if not study.ensembles:
        return pd.DataFrame(columns=_ENSEMBLES)
    frame = read_table(path, "evaluate", _ENSEMBLES)
    kept = []
    for name, ensemble in study.ensembles.items():
        rows = frame[
            (frame["ensemble"] == name)
            & (frame["set"] == "test")
            & (frame["first"] == ensemble.members[0])
            & (frame["second"] == ensemble.members[1])
            & frame["first_seed"].isin(study.seeds)
            & frame["second_seed"].isin(study.seeds)
        ]
        if rows.empty:
            pair = " and ".join(ensemble.members)
            raise damaged(path, "evaluate", f"has no row for ensemble {name} of {pair} on the test set")
        kept.append(_each_pair_once(rows))
    return pd.concat(kept, ignore_index=True)


def _each_pair_once(rows: pd.DataFrame) -> pd.DataFrame:
    """With two seeds a run's pairs (0, 1) and (1, 0) are the same two models: counted twice, the
    spread over seeds would look like zero.
    """
    models = [
        frozenset([(row.first, row.first_seed), (row.second, row.second_seed)])
        for row in rows.itertuples(index=False)
    ]
    return rows[~pd.Series(models, index=rows.index).duplicated()]


def _similarity(study: Study, path: Path, columns: list[str]) -> pd.DataFrame:
    frame = read_table(path, "similarity", columns)
    frame = frame[[pair in study.grid for pair in zip(frame["run"], frame["seed"], strict=True)]]
    known = set(zip(frame["run"], frame["seed"], strict=True))
    for run, seed in study.grid if _predicts(study, "test") else ():
        if (run, seed) not in known:
            raise damaged(path, "similarity", f"has no row for run {run}, seed {seed}")
    return frame.reset_index(drop=True)


def _comparisons(study: Study, path: Path) -> pd.DataFrame:
    frame = read_table(path, "evaluate", _COMPARISONS)
    frame = frame.assign(shift=frame["shift"].astype(object).fillna(""))
    gone = set(SHIFTS) - set(study.evaluation.shifts)
    return frame[
        frame["first"].isin(study.runs)
        & frame["second"].isin(study.runs)
        & frame["set"].isin(study.evaluation.sets)
        & ~frame["shift"].isin(gone)
    ].reset_index(drop=True)
