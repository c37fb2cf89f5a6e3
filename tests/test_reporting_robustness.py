"""Robustness of a study: the line and its residuals, against numpy's fit; what a study without shifts has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import synthetic_records as synthetic
from scipy.special import expit, logit
from synthetic_records import Numbers

from attention_transfer.config import Study
from attention_transfer.reporting import robustness
from attention_transfer.reporting.records import UNSHIFTED, Records, load


def records_of(folder: Path, study: Study, numbers: Numbers | None = None) -> Records:
    metrics, _ = synthetic.write(folder, study, numbers)
    return load(study, metrics)


def test_residuals_are_those_of_a_line_through_all_models(tmp_path: Path) -> None:
    records = records_of(tmp_path, synthetic.study(), Numbers(drop={"distill": 0.2, "copy": 0.15}))
    runs = list(records.study.runs)
    clean = np.array([records.values("accuracy", run, UNSHIFTED) for run in runs]).ravel()
    shifted = np.array([records.all_shifts("accuracy", run) for run in runs]).ravel()
    slope, intercept = np.polyfit(logit(clean), logit(shifted), 1)
    expected = shifted - expit(slope * logit(clean) + intercept)
    line = robustness.line(records)
    assert line is not None
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept))
    found = robustness.residuals(records, line)
    assert list(found) == runs
    np.testing.assert_allclose(np.concatenate(list(found.values())), expected, atol=1e-12)
    assert found["distill"].mean() < found["finetune"].mean()


def test_corruption_errors_are_relative_to_scratch_of_the_same_seed(tmp_path: Path) -> None:
    records = records_of(tmp_path, synthetic.study(), Numbers(drop={"distill": 0.2}))
    assert records.study.report is not None
    table = robustness.table(records, records.study.report)
    assert table is not None
    frame = table.frame.set_index("run")
    assert frame.loc["scratch", ["mce_mean", "relative_mce_mean"]].tolist() == pytest.approx([1, 1])
    errors = {
        run: np.array(
            [1 - records.shifted("accuracy", run, shift) for shift in records.study.evaluation.shifts]
        )
        for run in ("distill", "scratch")
    }
    expected = (errors["distill"] / errors["scratch"]).mean()
    assert frame.loc["distill", "mce_mean"] == pytest.approx(expected)
    assert f"all {len(records.study.grid)} models" in table.caption


@pytest.mark.parametrize("sets", [("test",), ("validation", "test")])
def test_without_shifts_there_is_nothing(sets: tuple[str, ...], tmp_path: Path) -> None:
    records = records_of(tmp_path, synthetic.study(evaluation__sets=sets))
    assert records.study.report is not None
    assert robustness.table(records, records.study.report) is None
    assert robustness.figure(records) is None


def test_the_figure_has_a_point_for_every_model(tmp_path: Path) -> None:
    records = records_of(tmp_path, synthetic.study())
    drawing = robustness.figure(records)
    assert drawing is not None
    (axes,) = drawing.figure.axes
    line, *points = axes.lines
    assert len(points) == len(records.study.runs)
    assert all(len(found.get_xdata()) == len(records.study.seeds) for found in points)
    assert len(line.get_xdata()) == 100
