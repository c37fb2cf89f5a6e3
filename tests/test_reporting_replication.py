"""Variance between teachers, draws and seeds, from runs that are told apart by their names."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import synthetic_records as synthetic
from synthetic_records import Numbers

from attention_transfer import config
from attention_transfer.evaluation.variance import variance_components
from attention_transfer.reporting import replication
from attention_transfer.reporting.experiment_claims import DRAWS, TEACHERS, replicated
from attention_transfer.reporting.experiments import Experiment
from attention_transfer.reporting.records import Records, load

FULL = Path(__file__).parents[1] / "presets" / "full.yaml"
full = functools.cache(lambda: config.experiments(FULL))  # it takes most of a second
METHODS = ("scratch", "finetune", "copy", "distill")
NAMES = ("teachers", "draw_1", "draw_2")


@pytest.fixture
def accuracy() -> dict[str, list[float]]:
    """Of every run, one value a seed."""
    generator = np.random.default_rng(0)
    names = {replicated(method, t, d) for method in METHODS for t in TEACHERS for d in DRAWS}
    return {name: generator.normal(0.8, 0.02, 3).tolist() for name in sorted(names)}


def records_of(folder: Path, accuracy: dict[str, list[float]]) -> Records:
    main = {method: accuracy[method] for method in METHODS}
    study = synthetic.study()
    metrics, _ = synthetic.write(folder, study, Numbers(accuracy=main))
    return load(study, metrics)


def experiments_of(accuracy: dict[str, list[float]], names: tuple[str, ...] = NAMES) -> list[Experiment]:
    studies = full()
    return [
        Experiment(name, studies[name], {run: dict(enumerate(accuracy[run])) for run in studies[name].runs})
        for name in names
    ]


def test_the_full_study_has_a_run_for_every_cell(accuracy: dict[str, list[float]]) -> None:
    studies = full()
    runs = {*METHODS, *(run for name in NAMES for run in studies[name].runs)}
    assert set(accuracy) == runs
    for name, draw in (("teachers", 0), ("draw_1", 1), ("draw_2", 2)):
        for method in METHODS:
            for teacher in TEACHERS:
                run = studies[name].runs.get(replicated(method, teacher, draw))
                assert run is None or method == "scratch" or run.teacher == teacher
                assert run is None or run.method == method
    assert [studies[name].data.seed for name in NAMES] == [0, 1, 2]


def test_components_are_those_of_the_crossed_design(accuracy: dict[str, list[float]], tmp_path: Path) -> None:
    records = records_of(tmp_path, accuracy)
    assert records.study.report is not None
    found = replication.table(records, experiments_of(accuracy), records.study.report)
    assert found is not None
    values = np.array(
        [
            [
                np.subtract(accuracy[replicated("distill", t, d)], accuracy[replicated("finetune", t, d)])
                for d in DRAWS
            ]
            for t in TEACHERS
        ]
    )
    expected = variance_components(values)
    row = found.frame.set_index("effect").loc["distill − finetune"]
    assert row["mean"] == pytest.approx(expected.mean)
    assert row["standard_error"] == pytest.approx(expected.standard_error)
    assert row["deviation_draw"] ** 2 == pytest.approx(expected.truncated.draw)
    assert row["main_mean"] == pytest.approx(values[0, 0].mean())
    assert row["main_standard_error"] == pytest.approx(values[0, 0].std(ddof=1) / np.sqrt(3))


def test_without_one_of_the_experiments_there_is_no_table(
    accuracy: dict[str, list[float]], tmp_path: Path
) -> None:
    records = records_of(tmp_path, accuracy)
    assert records.study.report is not None
    for missing in range(3):
        names = tuple(name for place, name in enumerate(NAMES) if place != missing)
        assert replication.table(records, experiments_of(accuracy, names), records.study.report) is None
