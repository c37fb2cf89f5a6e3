"""Variance components against a naive analysis of variance, exact identities and simulation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_transfer.evaluation.variance import VarianceComponents, variance_components

Floats = npt.NDArray[np.float64]
SIMULATIONS = 2000
NAMES = ("teacher", "draw", "interaction", "seed")


def simulated(rng: np.random.Generator, shape: tuple[int, int, int], variances: tuple[float, ...]) -> Floats:
    """Runs of the random model, with the variances of teacher, draw, interaction and seed."""
    teachers, draws, _ = shape
    sizes = ((teachers, 1, 1), (1, draws, 1), (teachers, draws, 1), shape)
    effects = [math.sqrt(v) * rng.standard_normal(size) for v, size in zip(variances, sizes, strict=True)]
    return np.asarray(0.8 + sum(effects))


def naive_mean_squares(values: Floats) -> tuple[float, float, float, float]:
    """Teachers, draws, interaction, residual: loops over the textbook's sums."""
    a, b, c = values.shape
    grand = float(values.mean())
    rows, columns = [values[i].mean() for i in range(a)], [values[:, j].mean() for j in range(b)]
    of_rows = b * c * sum((m - grand) ** 2 for m in rows) / (a - 1)
    of_columns = a * c * sum((m - grand) ** 2 for m in columns) / (b - 1)
    between, within = 0.0, 0.0
    for i in range(a):
        for j in range(b):
            cell = values[i, j].mean()
            between += c * (cell - rows[i] - columns[j] + grand) ** 2
            within += sum((values[i, j, k] - cell) ** 2 for k in range(c))
    return of_rows, of_columns, between / ((a - 1) * (b - 1)), within / (a * b * (c - 1))


def listed(found: VarianceComponents, which: str = "estimates") -> list[float]:
    return [getattr(getattr(found, which), name) for name in NAMES]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), shape=st.tuples(*(st.integers(2, 5) for _ in range(3))))
def test_components_are_those_of_a_naive_analysis_of_variance(seed: int, shape: tuple[int, int, int]) -> None:
    values = simulated(np.random.default_rng(seed), shape, (1.0, 0.5, 0.3, 0.8))
    a, b, c = shape
    ms_a, ms_b, ms_ab, ms_e = naive_mean_squares(values)
    found = variance_components(values)
    expected = [(ms_a - ms_ab) / (b * c), (ms_b - ms_ab) / (a * c), (ms_ab - ms_e) / c, ms_e]
    assert listed(found) == pytest.approx(expected, abs=1e-9)
    assert listed(found, "truncated") == pytest.approx([max(0.0, v) for v in expected], abs=1e-9)
    assert found.mean == pytest.approx(values.mean())
    if min(expected) > 0:  # the mean squares then cancel to a short form
        assert found.standard_error**2 == pytest.approx((ms_a + ms_b - ms_ab) / values.size)
    # the two crossed factors are alike; the order of their levels and a constant are of no effect
    swapped = variance_components(values.transpose(1, 0, 2)[::-1] + 1000)
    estimates = [swapped.estimates.draw, swapped.estimates.teacher]
    assert [*estimates, *listed(swapped)[2:]] == pytest.approx(expected, abs=1e-9)
    assert swapped.standard_error == pytest.approx(found.standard_error, abs=1e-9)


def test_pure_effects_are_told_apart() -> None:
    teachers, draws = np.array([-1.0, 0.0, 1.0]), np.array([-2.0, 2.0])
    none = np.zeros((3, 2, 2))
    seeds = none + np.array([-1.0, 1.0])
    only_teacher = variance_components(none + teachers[:, None, None])
    assert listed(only_teacher) == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-12)
    assert only_teacher.standard_error == pytest.approx(math.sqrt(1 / 3))
    only_draw = variance_components(none + draws[:, None])
    assert listed(only_draw) == pytest.approx([0.0, 8.0, 0.0, 0.0], abs=1e-12)
    assert only_draw.standard_error == pytest.approx(2.0)
    only_seed = variance_components(seeds)
    assert only_seed.estimates.seed == pytest.approx(2.0)
    assert only_seed.estimates.interaction == pytest.approx(-1.0)  # cells more alike than seeds allow
    assert only_seed.truncated.interaction == 0.0
    assert only_seed.standard_error == pytest.approx(math.sqrt(2 / 12))
    product = variance_components(none + teachers[:, None, None] * np.array([-1.0, 1.0])[:, None])
    assert product.estimates.interaction == pytest.approx(2.0)
    assert product.estimates.teacher == pytest.approx(-1.0)
    constant = variance_components(none + 0.7)
    assert (constant.mean, constant.standard_error) == pytest.approx((0.7, 0.0), abs=1e-12)


VARIANCES = [(1.0, 0.5, 0.3, 0.8), (0.0, 0.5, 0.0, 1.0), (0.2, 0.0, 0.6, 0.1)]


@pytest.mark.parametrize("variances", VARIANCES, ids=str)
def test_estimates_are_unbiased(variances: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    found = [variance_components(simulated(rng, (3, 4, 2), variances)) for _ in range(SIMULATIONS)]
    for which, bound in (("estimates", "both"), ("truncated", "below")):
        sample = np.array([listed(one, which) for one in found])
        error = 4 * sample.std(axis=0) / math.sqrt(SIMULATIONS)
        assert (sample.mean(axis=0) > np.array(variances) - error).all()
        if bound == "both":
            assert (sample.mean(axis=0) < np.array(variances) + error).all()
            assert (sample[:, :3].min(axis=0) < 0).all()  # negative ones are there, and needed
        else:
            assert (sample >= 0).all()


def test_standard_error_is_that_of_new_teachers_draws_and_seeds() -> None:
    """Against the spread of the means of many studies; the estimate of the variance is biased upwards only."""
    rng, shape, variances = np.random.default_rng(1), (6, 6, 3), (1.0, 0.5, 0.3, 0.8)
    found = [variance_components(simulated(rng, shape, variances)) for _ in range(SIMULATIONS)]
    exact = 1.0 / 6 + 0.5 / 6 + 0.3 / 36 + 0.8 / 108
    assert np.var([one.mean for one in found]) == pytest.approx(exact, rel=4 * math.sqrt(2 / SIMULATIONS))
    estimated = np.array([one.standard_error**2 for one in found])
    slack = 4 * estimated.std() / math.sqrt(SIMULATIONS)
    assert exact - slack < estimated.mean() < 1.02 * exact + slack
    # the naive error, as if all runs were independent, is far too small
    naive = np.mean([np.var(simulated(rng, shape, variances), ddof=1) / 108 for _ in range(200)])
    assert naive < exact / 3


def test_unsound_input_is_refused() -> None:
    for values, message in (
        (np.zeros((3, 3)), r"values: expected \(teachers, draws, seeds\), at least 2 of each, got \(3, 3\)"),
        (np.zeros((3, 3, 1)), r"at least 2 of each, got \(3, 3, 1\)"),
        (np.zeros((1, 3, 3)), r"at least 2 of each, got \(1, 3, 3\)"),
        (np.full((2, 2, 2), math.inf), "values: expected finite values, got .*inf"),
    ):
        with pytest.raises(ValueError, match=message):
            variance_components(values)
