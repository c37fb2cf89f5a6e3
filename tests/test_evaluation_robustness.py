"""Corruption errors against their definition, effective robustness against SciPy's regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attention_transfer.evaluation.robustness import corruption_error, effective_robustness


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), shifts=st.integers(1, 5), severities=st.integers(1, 5))
def test_corruption_error_is_its_definition(seed: int, shifts: int, severities: int) -> None:
    errors, baseline = np.random.default_rng(seed).uniform(0.3, 1, (2, shifts, severities))
    found = corruption_error(errors, baseline, clean_error=0.1, baseline_clean_error=0.25)
    for shift in range(shifts):
        top, bottom = sum(errors[shift].tolist()), sum(baseline[shift].tolist())
        assert found.shifts[shift] == pytest.approx(top / bottom)
        relative = (top - severities * 0.1) / (bottom - severities * 0.25)
        assert found.relative_shifts[shift] == pytest.approx(relative)
    assert found.mean == pytest.approx(sum(found.shifts) / shifts)
    assert found.relative_mean == pytest.approx(sum(found.relative_shifts) / shifts)
    assert len(found.shifts) == len(found.relative_shifts) == shifts
    order = np.random.default_rng(seed).permutation(severities)
    again = corruption_error(errors[:, order], baseline, clean_error=0.1, baseline_clean_error=0.25)
    assert again.shifts == pytest.approx(found.shifts)  # sums over severities, not a mean of their ratios


def test_the_baseline_is_one() -> None:
    errors = np.array([[0.2, 0.5], [0.3, 0.9]])
    itself = corruption_error(errors, errors, clean_error=0.1, baseline_clean_error=0.1)
    assert (itself.mean, itself.relative_mean) == pytest.approx((1.0, 1.0))
    # better everywhere, and so better by mCE, but no less hurt by the shift
    shifted = corruption_error(errors - 0.1, errors, clean_error=0.0, baseline_clean_error=0.1)
    assert shifted.mean < 1
    assert shifted.relative_mean == pytest.approx(1.0)


def test_without_a_yardstick_there_is_no_ratio() -> None:
    """0.1 + 0.2 is not 0.3 in binary: a rise of the baseline that is rounding is none."""
    baseline = np.array([[0.1 + 0.2, 0.1 + 0.2], [0.5, 0.7], [0.0, 0.0]])
    found = corruption_error(np.full((3, 2), 0.4), baseline, clean_error=0.2, baseline_clean_error=0.3)
    assert found.shifts == pytest.approx((4 / 3, 0.8 / 1.2, math.nan), nan_ok=True)
    assert found.relative_shifts == pytest.approx((math.nan, 0.2 / 0.3, math.nan), nan_ok=True)
    assert math.isnan(found.mean)
    assert math.isnan(found.relative_mean)
    part = corruption_error(np.full((2, 2), 0.4), baseline[:2], clean_error=0.2, baseline_clean_error=0.3)
    assert part.mean == pytest.approx((4 / 3 + 2 / 3) / 2)
    assert math.isnan(part.relative_mean)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), models=st.integers(3, 12))
def test_effective_robustness_is_a_residual_of_scipys_line(seed: int, models: int) -> None:
    rng = np.random.default_rng(seed)
    inside, outside = rng.uniform(0.5, 0.95, models), rng.uniform(0.2, 0.9, models)
    found = effective_robustness(
        inside, outside, [0.8, 0.9], [0.7, 0.5], examples_in=10000, examples_out=10000
    )
    x, y = [logit(a) for a in inside], [logit(a) for a in outside]
    line = stats.linregress(x, y)
    assert (found.slope, found.intercept, found.r2) == pytest.approx(
        (line.slope, line.intercept, line.rvalue**2), abs=1e-9
    )
    spread = math.sqrt(
        sum((b - line.slope * a - line.intercept) ** 2 for a, b in zip(x, y, strict=True)) / (models - 2)
    )
    assert found.residual_standard_deviation == pytest.approx(spread)
    assert found.models == models
    expected = [b - sigmoid(line.slope * logit(a) + line.intercept) for a, b in ((0.8, 0.7), (0.9, 0.5))]
    assert found.residuals == pytest.approx(expected)


def test_a_model_on_the_line_has_no_effective_robustness() -> None:
    def under_shift(accuracy: float) -> float:
        return sigmoid(0.8 * logit(accuracy) - 1.0)

    fit = [0.6, 0.7, 0.85, 0.9]
    judged = [0.65, 0.95, 0.8]
    found = effective_robustness(
        fit,
        [under_shift(a) for a in fit],
        judged,
        [under_shift(0.65), under_shift(0.95) + 0.03, under_shift(0.8) - 0.05],
        examples_in=1000,
        examples_out=1000,
    )
    assert (found.slope, found.intercept, found.r2) == pytest.approx((0.8, -1.0, 1.0))
    assert found.residual_standard_deviation == pytest.approx(0.0, abs=1e-9)
    assert found.residuals == pytest.approx((0.0, 0.03, -0.05), abs=1e-9)


def test_clipping_is_half_an_example_of_each_set() -> None:
    """A perfect model counts as 1 - 0.5/n on the way through the logit, and as 1 in its residual."""
    fit_in, fit_out = [0.5, 0.75, 1.0], [0.0, 0.5, 0.8]
    found = effective_robustness(fit_in, fit_out, [1.0], [1.0], examples_in=100, examples_out=10)
    line = stats.linregress([logit(a) for a in (0.5, 0.75, 0.995)], [logit(a) for a in (0.05, 0.5, 0.8)])
    assert (found.slope, found.intercept) == pytest.approx((line.slope, line.intercept))
    assert found.residuals == pytest.approx([1 - sigmoid(line.slope * logit(0.995) + line.intercept)])


def test_no_spread_under_shift_is_a_level_line() -> None:
    found = effective_robustness([0.5, 0.6, 0.7], [0.4] * 3, [0.9], [0.45], examples_in=50, examples_out=50)
    assert (found.slope, found.residual_standard_deviation) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert math.isnan(found.r2)
    assert found.residuals == pytest.approx([0.05])
    solved = [0.999, 0.9995, 1.0]  # of 50 examples: all the same
    found = effective_robustness([0.5, 0.6, 0.7], solved, [0.9], [1.0], examples_in=50, examples_out=50)
    assert math.isnan(found.r2)
    assert found.residuals == pytest.approx([0.01])


def test_unsound_input_is_refused() -> None:
    def corruption(errors: object, baseline: object, clean: float = 0.1) -> None:
        corruption_error(errors, baseline, clean_error=clean, baseline_clean_error=0.1)  # type: ignore[arg-type]

    def effective(fit_in: list[float], fit_out: list[float], examples: int = 100) -> None:
        effective_robustness(fit_in, fit_out, [0.5], [0.5], examples_in=examples, examples_out=100)

    good = [0.5, 0.6, 0.7]
    for use, message in (
        (lambda: corruption([0.1, 0.2], [0.1, 0.2]), r"errors: expected \(shifts, severities\), got \(2,\)"),
        (
            lambda: corruption([[0.1, 0.2]], [[0.1]]),
            r"baseline_errors: expected shape \(1, 2\), got \(1, 1\)",
        ),
        (lambda: corruption([[10.0]], [[0.1]]), r"errors: expected shares between 0 and 1, got \[\[10.0\]\]"),
        (lambda: corruption([[0.1]], [[math.nan]]), "baseline_errors: expected shares between 0 and 1"),
        (
            lambda: corruption([[0.1]], [[0.1]], 1.5),
            "clean error of errors: expected a number between 0 and 1",
        ),
        (lambda: effective(good[:2], good[:2]), "fit_in: expected at least 3 models, got 2"),
        (lambda: effective([0.5] * 3, good), "fit_in: expected models of different accuracy"),
        (lambda: effective([0.999, 0.9995, 1.0], good), "fit_in: expected models of different accuracy"),
        (lambda: effective(good, good[:2]), r"fit_out: expected one value per model.*got \(2,\)"),
        (lambda: effective([50, 60, 70], good), "fit_in: expected shares between 0 and 1"),
        (lambda: effective(good, good, 0), "examples: expected at least 1 in both sets, got 0 and 100"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
