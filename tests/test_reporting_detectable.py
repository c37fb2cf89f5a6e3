"""Which differences a study can find: against simulated studies, and by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic_records as synthetic
from scipy.stats import ttest_1samp
from synthetic_records import Numbers

from attention_transfer import config
from attention_transfer.reporting import detectable
from attention_transfer.reporting.records import Records, load

ROOT = Path(__file__).parents[1]
ACCURACY = {
    "scratch": (0.80, 0.81, 0.82),  # standard deviation 1 point
    "finetune": (0.86, 0.88, 0.90),  # 2 points
    "copy": (0.85, 0.85, 0.85),
    "distill": (0.84, 0.88, 0.92),  # 4 points
}


@pytest.fixture
def pilot(tmp_path: Path) -> Records:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study, Numbers(accuracy=ACCURACY))
    return load(study, metrics)


def test_spread_adds_up_over_the_runs_of_a_claim(pilot: Records) -> None:
    found = detectable.table(pilot.study, {}, pilot).frame.set_index("claim")
    deviation = found["standard_deviation"]
    assert deviation["main/pretraining_helps"] == pytest.approx(np.hypot(0.01, 0.02))
    assert deviation["main/distill"] == pytest.approx(np.hypot(0.04, 0.02))
    assert deviation["main/copy"] == pytest.approx(np.hypot(0.005, 0.01), rel=0.02)
    assert set(found["seeds"]) == {3}


def test_four_in_five_studies_find_that_difference(pilot: Records) -> None:
    found = detectable.table(pilot.study, {}, pilot).frame.set_index("claim").loc["main/distill"]
    effects = np.random.default_rng(0).normal(
        found["smallest_detectable"], found["standard_deviation"], (20_000, 3)
    )
    share = (ttest_1samp(effects, 0, axis=1).pvalue < detectable.SIGNIFICANCE).mean()
    assert share == pytest.approx(detectable.POWER, abs=0.01)


def test_experiments_of_the_full_study_are_judged_before_they_run(pilot: Records) -> None:
    """Those whose runs there are: a method that the pilot lacks has the largest spread in it."""
    path = ROOT / "presets" / "full.yaml"
    study = config.load(path)
    found = detectable.table(study, config.experiments(path), pilot).frame.set_index("claim")
    features = found.loc["feature/residual_stream"]
    assert features["standard_deviation"] == pytest.approx(0.04 * np.sqrt(2))
    assert features["seeds"] == 5
    assert found.loc["main/distill", "seeds"] == len(study.seeds) > 5
    assert np.isfinite(found["smallest_detectable"]).all()


@pytest.mark.slow
def test_the_command_needs_a_study_that_has_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attention_transfer", "detectable", "--params", ROOT / "presets" / "full.yaml",
         "--pilot", ROOT / "params.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "metrics/core" in done.stderr
    assert not list(tmp_path.rglob("*.md"))
