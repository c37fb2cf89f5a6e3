"""The experiments of a study: test accuracies of their runs, beside those of the main comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from attention_transfer.config import Report, Study
from attention_transfer.evaluation.statistics import Interval, mean_interval
from attention_transfer.reporting import tables
from attention_transfer.reporting.contrasts import Accuracies
from attention_transfer.reporting.experiment_claims import CONTRASTS
from attention_transfer.reporting.records import Records, damaged, read_run, read_table
from attention_transfer.reporting.tables import Table

HEADINGS = {
    "qkv": "Queries, keys, values",
    "layers": "Which layers",
    "layers_rate": "Which layers, at the learning rate of scratch",
    "heads": "How many heads",
    "averaging": "Averaged maps",
    "feature": "Features and predictions instead of attention",
    "teacher_init": "Whose maps, whose weights",
    "pretraining": "Other ways to pre-train",
    "pretraining_data": "Other images to pre-train on",
    "size": "Smaller and larger models",
    "families_plain": "A plain teacher pre-trained by SimMIM",
    "families_position": "Components of other families: position",
    "families_norm": "Components of other families: norms and scales",
    "families_block": "Components of other families: registers and SwiGLU",
    "teachers": "Other seeds of the teacher",
    "draw_1": "Another draw of the labels",
    "draw_2": "A third draw of the labels",
    "task_data": "Another task",
    "labels": "Ten times the labels",
}
"""By experiment; one that is not here is headed by its name."""


@dataclass(frozen=True)
class Experiment:
    """One experiment's runs.

    Attributes:
        accuracy: on the test set, by run and seed.
    """

    name: str
    study: Study
    accuracy: dict[str, dict[int, float]]

    @property
    def heading(self) -> str:
        return heading(self.name)


def heading(name: str) -> str:
    """Of an experiment's section."""
    return HEADINGS.get(name, name.replace("_", " "))


def have_run(studies: Mapping[str, Study], metrics: Path) -> dict[str, Study]:
    """Those of which `evaluate` has left records: each can be run by itself, and the report shows what there is."""
    return {name: study for name, study in studies.items() if (metrics / "evaluate" / name).is_dir()}


def as_far_as_run(study: Study, experiments: Mapping[str, Study], metrics: Path) -> Study:
    """The study without those teachers that only experiments use that have not been run: they may not exist yet."""
    waiting = {name for each in experiments.values() for name in each.transferred_from}
    ready = (study, *have_run(experiments, metrics).values())
    waiting -= {name for each in ready for name in each.transferred_from}
    kept = {
        name: teacher
        for name, teacher in study.teachers.items()
        if name not in waiting or (metrics / "probe" / name).is_dir()
    }
    return study.model_copy(update={"teachers": kept})


def of_experiments_alone(study: Study, experiments: Mapping[str, Study]) -> set[str]:
    """Teachers of experiments' runs and of none of the study's own: an experiment's graph does without their probes."""
    used = {name for each in experiments.values() for name in each.transferred_from}
    return used - {*study.transferred_from}


def load(studies: Mapping[str, Study], metrics: Path) -> list[Experiment]:
    """Reads what `evaluate` has found of each.

    Args:
        studies: by name, see `config.experiments`.
        metrics: folder of the records of the study that they extend.

    Raises:
        StudyError: a record is missing or damaged, or lacks a run.
    """
    return [_load(name, study, metrics / "evaluate" / name) for name, study in studies.items()]


def _load(name: str, study: Study, folder: Path) -> Experiment:
    read_run(folder, "evaluate")
    frame = read_table(folder / "scores.csv", "evaluate", ["run", "seed", "set", "accuracy"])
    frame = frame[frame["set"] == "test"].set_index(["run", "seed"])["accuracy"]
    found: dict[str, dict[int, float]] = {run: {} for run in study.runs}
    for run, seed in study.grid if "test" in study.evaluation.sets else ():
        if (run, seed) not in frame.index or not np.isfinite(frame.loc[run, seed]):
            raise damaged(
                folder / "scores.csv", "evaluate", f"has no test accuracy of run {run}, seed {seed}"
            )
        found[run][seed] = float(frame.loc[run, seed])
    return Experiment(name, study, found)


def accuracies(records: Records, experiments: list[Experiment]) -> Accuracies:
    """Test accuracy by seed of any run, of the main comparison or of an experiment."""
    every = {
        run: dict(zip(records.study.seeds, records.values("accuracy", run).tolist(), strict=True))
        for run in records.study.runs
    }
    for experiment in experiments:
        every |= experiment.accuracy
    return lambda run: every.get(run, {})


def references(experiment: Experiment, records: Records, report: Report) -> dict[str, float]:
    """Runs of the main comparison beside which an experiment is seen: its two ends, and those that its claims name.

    Returns:
        Mean test accuracy over the experiment's seeds; nothing for an experiment with images of its own.
    """
    if experiment.study.own_data:
        return {}
    asked = [contrast for contrast in CONTRASTS if contrast.section == experiment.name]
    named = {report.scratch, report.finetune, *(run for contrast in asked for run in contrast.weights)}
    of = accuracies(records, [])
    found = {
        run: [value for seed, value in of(run).items() if seed in experiment.study.seeds]
        for run in records.study.runs
        if run in named
    }
    return {run: float(np.mean(values)) for run, values in found.items() if values}


def listed(names: Iterable[str]) -> str:
    """Such as `scratch, copy and finetune`."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def table(experiment: Experiment, records: Records, report: Report) -> Table:
    """Each run's accuracy, and its difference from the scratch and the fine-tuned students on the same images."""
    confidence, ends = records.study.evaluation.confidence, _ends(experiment, report)
    of = accuracies(records, [experiment])
    rows, shown = [], []
    for run, found in experiment.accuracy.items():
        if not found:
            continue
        values = {"accuracy": list(found.values())}
        for name in ends:
            end = of(name)
            values[f"minus_{name}"] = [value - end[seed] for seed, value in found.items() if seed in end]
        over = {
            name: mean_interval(each, confidence) if each else Interval(np.nan, np.nan, np.nan, 0)
            for name, each in values.items()
        }
        row: dict[str, object] = {"run": run, "seeds": len(found)}
        for name, interval in over.items():
            row |= tables.spread(name, interval)
        rows.append(row)
        shown.append(
            {
                "run": run,
                "seeds": str(len(found)),
                "test accuracy, %": tables.per_cent(over["accuracy"]),
                **{f"minus {name}, points": tables.per_cent(over[f"minus_{name}"]) for name in ends},
            }
        )
    caption = (
        f"{experiment.heading}: accuracy on the test set, and its difference from "
        f"{'' if experiment.study.own_data else 'the main comparison’s '}{' and '.join(ends)} on the same seeds: mean "
        f"and {tables.level(records)} interval."
    )
    return Table(f"experiment_{experiment.name}", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def _ends(experiment: Experiment, report: Report) -> list[str]:
    """The runs that an experiment's are compared with; with images of its own, its first of either method."""
    if not experiment.study.own_data:
        return [report.scratch, report.finetune]
    first: dict[str, str] = {}
    for name, run in experiment.study.runs.items():
        first.setdefault(run.method, name)
    return [first[method] for method in ("scratch", "finetune") if method in first]
