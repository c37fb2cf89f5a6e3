"""The table of published image sets: accuracies, differences to fine-tuning, mCE by AlexNet's errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_records as synthetic
from scipy import stats

from attention_transfer.config import Study
from attention_transfer.reporting import published
from attention_transfer.reporting.published import ALEXNET_ERRORS
from attention_transfer.reporting.records import Records, load

SETS = {
    "sketch": {"layout": "class_names", "folder": "data/sketch"},
    "absent": {"layout": "class_numbers", "folder": "data/absent"},
    "c": {"layout": "corruptions", "folder": "data/c", "corruptions": ("fog", "snow")},
}


def study() -> Study:
    return synthetic.study(
        evaluation__sets=("validation", "test", "published"),
        evaluation__shifts=(),
        evaluation__severities=(1, 5),
        evaluation__published=SETS,
    )


def accuracy(run: str, seed: int, condition: str, severity: int) -> float:
    return (
        0.5
        + 0.01 * len(run)
        + 0.02 * seed
        - 0.05 * severity
        - 0.01 * len(condition)
        + 0.003 * seed * len(run)
    )


CONDITIONS = [
    ("sketch", 0),
    *((f"c/{corruption}", level) for corruption in ("fog", "snow") for level in (1, 5)),
]


@pytest.fixture
def records(tmp_path: Path) -> Records:
    the = study()
    metrics, _ = synthetic.write(tmp_path, the)
    path = metrics / "evaluate" / "scores.csv"
    frame = pd.read_csv(path)
    more = [
        {
            "run": run,
            "seed": seed,
            "set": "published",
            "shift": condition,
            "severity": severity,
            "examples": 9,
        }
        | {"accuracy": accuracy(run, seed, condition, severity), "nll": 1.0, "brier": 1.0, "ece": 0.1}
        for run, seed in the.grid
        for condition, severity in CONDITIONS
    ]
    synthetic.overwrite(path, pd.concat([frame, pd.DataFrame(more)]))
    return load(the, metrics)


def test_accuracies_and_differences_by_seed(records: Records) -> None:
    assert records.study.report is not None
    table = published.table(records, records.study.report)
    assert table is not None
    frame = table.frame.set_index(["set", "run"])
    for run in records.study.runs:
        found = np.array([accuracy(run, seed, "sketch", 0) for seed in (0, 1, 2)])
        usual = np.array([accuracy("finetune", seed, "sketch", 0) for seed in (0, 1, 2)])
        row = frame.loc["sketch", run]
        assert row["accuracy_mean"] == pytest.approx(found.mean())
        assert row["beyond_finetune_mean"] == pytest.approx((found - usual).mean())
        if run != "finetune":
            expected = stats.t.interval(0.95, 2, (found - usual).mean(), stats.sem(found - usual))
            assert (row["beyond_finetune_low"], row["beyond_finetune_high"]) == pytest.approx(expected)


def test_mce_divides_each_corruption_by_alexnets_error(records: Records) -> None:
    assert records.study.report is not None
    table = published.table(records, records.study.report)
    assert table is not None
    by_hand = np.mean(
        [
            np.mean(
                [
                    (1 - np.mean([accuracy("copy", seed, f"c/{kind}", level) for level in (1, 5)]))
                    / ALEXNET_ERRORS[kind]
                    for kind in ("fog", "snow")
                ]
            )
            for seed in (0, 1, 2)
        ]
    )
    row = table.frame.set_index(["set", "run"]).loc["c", "copy"]
    assert row["mce_mean"] == pytest.approx(by_hand)


def test_alexnets_errors_give_the_corruption_errors_that_others_report() -> None:
    """Top-1 accuracy and corruption error of a ResNet-50, per cent, as published beside its robustness results."""
    for corruption, (accurate, error) in {
        "gaussian_noise": (29.29, 79.77),
        "impulse_noise": (23.81, 82.58),
        "defocus_blur": (38.75, 74.71),
        "glass_blur": (26.79, 88.61),
        "frost": (38.14, 74.84),
        "fog": (45.83, 66.11),
        "brightness": (68.02, 56.64),
        "contrast": (39.06, 71.43),
        "elastic_transform": (45.25, 84.75),
    }.items():
        assert (100 - accurate) / ALEXNET_ERRORS[corruption] == pytest.approx(error, abs=0.02)
    assert len(ALEXNET_ERRORS) == 15


def test_what_is_missing_is_said(records: Records) -> None:
    assert records.study.report is not None
    table = published.table(records, records.study.report)
    assert table is not None
    assert "absent" not in set(table.frame["set"])
    assert table.caption.endswith("Not there when the study ran, and left out: absent.")


def test_a_study_without_published_sets_has_no_table(tmp_path: Path) -> None:
    the = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, the)
    assert the.report is not None
    assert published.table(load(the, metrics), the.report) is None
