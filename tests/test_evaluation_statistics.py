"""Intervals and tests against SciPy, exact identities, naive resampling and simulated coverage."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attention_transfer.evaluation.statistics import (
    PairedDifference,
    equivalent,
    gap_recovered,
    hierarchical_bootstrap,
    mean_interval,
    paired_difference,
)

Bools = npt.NDArray[np.bool_]
SIMULATIONS = 3000
FOUR_SIGMA = 4 * math.sqrt(0.95 * 0.05 / SIMULATIONS)


def test_mean_interval_is_students() -> None:
    values = [0.81, 0.83, 0.80, 0.86]
    found = mean_interval(values, 0.9)
    low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((0.825, low, high, 4), abs=1e-12)


def test_paired_difference_is_the_paired_t_test() -> None:
    first, second = np.random.default_rng(0).normal(0.8, 0.02, (2, 5))
    found = paired_difference(first, second, 0.95)
    expected = stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert found.mean / found.standard_error == pytest.approx(expected.statistic)
    assert found.n == 5


def test_pairing_removes_what_the_seeds_share() -> None:
    seeds = np.array([0.1, 0.5, 0.9])
    assert paired_difference(seeds + 0.25, seeds, 0.95) == PairedDifference(
        *(pytest.approx(0.25) for _ in range(3)), n=3, standard_error=pytest.approx(0.0, abs=1e-12)
    )


def test_one_seed_has_no_spread() -> None:
    single = mean_interval([0.7], 0.95)
    assert (single.mean, single.n) == (0.7, 1)
    pair = paired_difference([0.7], [0.5], 0.95)
    assert pair.mean == pytest.approx(0.2)
    gap = gap_recovered([0.7], [0.5], [0.9], 0.95)
    assert gap.mean == pytest.approx(0.5)
    ends = [single.low, single.high, pair.low, pair.high, pair.standard_error, gap.low, gap.high]
    assert np.isnan(ends).all()
    test = equivalent([0.7], [0.7], 0.1, 0.95)
    assert math.isnan(test.p_value)
    assert test.equivalent is False


def test_gap_recovered_without_spread() -> None:
    found = gap_recovered([0.8, 0.9, 0.7], [0.6, 0.7, 0.5], [1.0, 1.1, 0.9], 0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-9)


def runs(rng: np.random.Generator, n: int, spread: float) -> list[npt.NDArray[np.float64]]:
    """Method, scratch and finetune with a part that the seed gives to all three; true ratio 0.7."""
    shared = rng.normal(0, spread, n)
    return [mean + shared + rng.normal(0, spread, n) for mean in (0.67, 0.60, 0.70)]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 12), confidence=st.sampled_from([0.8, 0.95]))
def test_gap_recovered_ends_where_the_t_test_begins_to_reject(seed: int, n: int, confidence: float) -> None:
    """At the ends of Fieller's set, method - scratch - r (finetune - scratch) has p = alpha."""
    method, scratch, finetune = runs(np.random.default_rng(seed), n, 0.02)
    found = gap_recovered(method, scratch, finetune, confidence)
    assert found.mean == pytest.approx((method - scratch).sum() / (finetune - scratch).sum())
    if stats.ttest_1samp(finetune - scratch, 0).pvalue >= 1 - confidence:
        assert (found.low, found.high) == (-math.inf, math.inf)
    else:
        assert found.low <= found.mean <= found.high
        for end in (found.low, found.high):
            test = stats.ttest_1samp(method - scratch - end * (finetune - scratch), 0)
            assert test.pvalue == pytest.approx(1 - confidence, rel=1e-5)


@pytest.mark.parametrize("n", [3, 10])
def test_gap_recovered_covers(n: int) -> None:
    rng = np.random.default_rng(1)
    found = [gap_recovered(*runs(rng, n, 0.01), 0.95) for _ in range(SIMULATIONS)]
    if n == 10:  # at 3 seeds some sets are unbounded: the case must be part of the coverage
        assert all(math.isfinite(interval.low) for interval in found)
    else:
        assert any(math.isinf(interval.low) for interval in found)
    coverage = np.mean([interval.low <= 0.7 <= interval.high for interval in found])
    assert coverage == pytest.approx(0.95, abs=FOUR_SIGMA + (0.01 if n == 3 else 0))


def test_gap_recovered_agrees_with_a_bootstrap() -> None:
    rng = np.random.default_rng(2)
    samples = np.stack(runs(rng, 60, 0.02))
    found = gap_recovered(*samples, 0.95)
    method, scratch, finetune = samples[:, rng.integers(0, 60, (20000, 60))].mean(axis=2)
    low, high = np.quantile((method - scratch) / (finetune - scratch), [0.025, 0.975])
    width = high - low
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * width)
    # what a seed gives to all three methods alike is of no effect: the values are paired
    with_shared = gap_recovered(*(samples + rng.normal(0, 0.3, 60)), 0.95)
    assert (with_shared.low, with_shared.high) == pytest.approx((found.low, found.high), abs=1e-9)


def test_gap_recovered_with_no_gap() -> None:
    found = gap_recovered([0.7, 0.8, 0.9], [0.5, 0.6, 0.4], [0.6, 0.4, 0.5], 0.95)
    assert (found.low, found.high) == (-math.inf, math.inf)
    equal = gap_recovered([0.5, 0.75], [0.25, 0.5], [0.25, 0.5], 0.95)
    assert math.isnan(equal.mean)
    assert (equal.low, equal.high) == (-math.inf, math.inf)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 12),
    margin=st.floats(0.001, 0.1),
    confidence=st.sampled_from([0.9, 0.95]),
)
def test_equivalence_is_two_one_sided_tests(seed: int, n: int, margin: float, confidence: float) -> None:
    first, second = np.random.default_rng(seed).normal(0.8, 0.02, (2, n))
    found = equivalent(first, second, margin, confidence)
    above = stats.ttest_rel(first + margin, second, alternative="greater").pvalue
    below = stats.ttest_rel(first - margin, second, alternative="less").pvalue
    assert found.p_value == pytest.approx(max(above, below), rel=1e-6, abs=1e-12)
    interval = paired_difference(first, second, 2 * confidence - 1)
    assert found.equivalent == (-margin < interval.low and interval.high < margin)
    assert found == equivalent(second, first, margin, confidence)


def test_equivalence_errs_as_rarely_as_promised() -> None:
    """At a true difference of just the margin the verdict is wrong in 5 % of all studies."""
    rng = np.random.default_rng(3)
    draws = rng.normal([[0.02]], 0.01, (SIMULATIONS, 8))
    wrong = np.mean([equivalent(row, np.zeros(8), 0.02, 0.95).equivalent for row in draws])
    assert wrong == pytest.approx(0.05, abs=FOUR_SIGMA)


def test_equivalence_without_spread() -> None:
    assert equivalent([0.5, 0.75], [0.25, 0.5], 0.5, 0.95).p_value == 0.0
    on_margin = equivalent([0.5, 0.75], [0.25, 0.5], 0.25, 0.95)
    assert (on_margin.p_value, on_margin.equivalent) == (1.0, False)


def outcomes(rng: np.random.Generator, seeds: int, examples: int, gain: float) -> tuple[Bools, Bools]:
    """Right or wrong of two methods whose examples differ in difficulty and whose seeds differ in skill."""
    difficulty = rng.normal(0, 1, examples)

    def method(skill: float) -> Bools:
        drawn = skill + rng.normal(0, 0.15, (seeds, 1)) - difficulty
        return np.asarray(drawn + rng.normal(0, 0.5, (seeds, examples)) > 0)

    return method(1.0 + gain), method(1.0)


def naive_bootstrap(first: Bools, second: Bools, resamples: int, rng: np.random.Generator) -> list[float]:
    found = []
    for _ in range(resamples):
        rows = rng.integers(0, len(first), len(first))
        columns = rng.integers(0, first.shape[1], first.shape[1])
        found.append(first[np.ix_(rows, columns)].mean() - second[np.ix_(rows, columns)].mean())
    return found


@pytest.mark.parametrize(("seeds", "examples"), [(1, 300), (4, 60), (5, 500)])
def test_hierarchical_bootstrap_agrees_with_a_loop(seeds: int, examples: int) -> None:
    rng = np.random.default_rng(seeds)
    first, second = outcomes(rng, seeds, examples, 0.4)
    found = hierarchical_bootstrap(first, second, resamples=20000, confidence=0.9, seed=0)
    low, high = np.quantile(naive_bootstrap(first, second, 6000, rng), [0.05, 0.95])
    assert found.mean == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    assert found.n == seeds
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low) + 1 / first.size)


def test_hierarchical_bootstrap_has_the_variance_of_its_definition() -> None:
    """Weights u/S and v/E of multinomial counts: E[(u' D v)^2] = trace(E[u u'] D E[v v'] D')."""
    rng = np.random.default_rng(6)
    first, second = outcomes(rng, 6, 400, 0.2)
    d = first.astype(float) - second.astype(float)

    def second_moment(n: int) -> npt.NDArray[np.float64]:
        return (np.eye(n) + (1 - 1 / n)) / n**2

    variance = np.trace(second_moment(6) @ d @ second_moment(400) @ d.T) - d.mean() ** 2
    found = hierarchical_bootstrap(first, second, resamples=40000, confidence=0.95, seed=1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)


@pytest.mark.slow
def test_hierarchical_bootstrap_covers() -> None:
    """Seeds and examples both vary. The true difference comes from one huge draw."""
    rng = np.random.default_rng(7)
    truth = np.subtract(*(method.mean() for method in outcomes(rng, 1000, 1000, 0.2)))
    hits = []
    for number in range(300):
        first, second = outcomes(rng, 20, 100, 0.2)
        found = hierarchical_bootstrap(first, second, resamples=300, confidence=0.9, seed=number)
        hits.append(found.low <= truth <= found.high)
    assert np.mean(hits) == pytest.approx(0.9, abs=0.06)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), seeds=st.integers(1, 5), examples=st.integers(1, 40))
def test_hierarchical_bootstrap_properties(seed: int, seeds: int, examples: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = outcomes(rng, seeds, examples, 0.3)
    found = hierarchical_bootstrap(first, second, resamples=50, confidence=0.95, seed=seed)
    order = rng.permutation(examples)
    again = hierarchical_bootstrap(
        first[:, order], second[:, order], resamples=50, confidence=0.95, seed=seed
    )
    assert again == found
    assert -1 <= found.low <= found.high <= 1
    same = hierarchical_bootstrap(first, first, resamples=50, confidence=0.95, seed=seed)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    sure = hierarchical_bootstrap(
        np.ones_like(first), np.zeros_like(first), resamples=50, confidence=0.95, seed=seed
    )
    assert (sure.mean, sure.low, sure.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)


def test_hierarchical_bootstrap_depends_on_its_seed_and_not_on_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = outcomes(np.random.default_rng(8), 4, 200, 0.2)
    found = [hierarchical_bootstrap(first, second, resamples=99, confidence=0.9, seed=s) for s in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]
    monkeypatch.setattr("attention_transfer.evaluation.statistics.BLOCK", 1)  # one resample at a time
    small = hierarchical_bootstrap(first, second, resamples=20000, confidence=0.9, seed=0)
    monkeypatch.undo()
    large = hierarchical_bootstrap(first, second, resamples=20000, confidence=0.9, seed=0)
    assert (small.low, small.high) == pytest.approx(
        (large.low, large.high), abs=0.03 * (large.high - large.low)
    )


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [5, 12])
def test_hierarchical_bootstrap_is_fast_and_small(seeds: int) -> None:
    """Also where every example is a pattern of its own."""
    rng = np.random.default_rng(9)
    first, second = rng.random((2, seeds, 10000)) < 0.5
    tracemalloc.start()
    start = time.process_time()
    hierarchical_bootstrap(first, second, resamples=2000, confidence=0.95, seed=0)
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert seconds < (2 if seeds == 5 else 6)


def test_unsound_input_is_refused() -> None:
    right = np.ones((2, 3), dtype=bool)

    def bootstrap(first: Bools, second: Bools, resamples: int = 10, confidence: float = 0.9) -> None:
        hierarchical_bootstrap(first, second, resamples=resamples, confidence=confidence, seed=0)

    for use, message in (
        (lambda: paired_difference([1.0, 2.0], [1.0], 0.9), "second: expected 2 values, one per seed, got 1"),
        (lambda: gap_recovered([1.0], [1.0], [1.0, 2.0], 0.9), "finetune: expected 1 values"),
        (lambda: mean_interval([], 0.9), r"values: expected one value per seed.*got shape \(0,\)"),
        (lambda: mean_interval([1.0, math.nan], 0.9), "values: expected finite values"),
        (lambda: mean_interval([1.0, 2.0], 95), "confidence: expected a number between 0 and 1, got 95"),
        (lambda: mean_interval([1.0], 95), "confidence: expected a number between 0 and 1, got 95"),
        (lambda: equivalent([1.0], [1.0], 0.0, 0.9), "margin: expected a positive number, got 0.0"),
        (lambda: equivalent([1.0], [1.0], 0.1, 1.0), "confidence: expected"),
        (lambda: bootstrap(right, right[:, :2]), r"second_correct: expected shape \(2, 3\), got \(2, 2\)"),
        (
            lambda: bootstrap(right.astype(float), right),
            r"first_correct: expected bool.*got float64 \(2, 3\)",
        ),  # type: ignore[arg-type]
        (lambda: bootstrap(right[0], right), r"first_correct: expected bool.*got bool \(3,\)"),
        (lambda: bootstrap(right, right, resamples=0), "resamples: expected at least 1, got 0"),
        (lambda: bootstrap(right, right, confidence=0.0), "confidence: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.slow
def test_statistics_come_without_torch() -> None:
    """The report reads records with these and must not load torch."""
    program = "import attention_transfer.evaluation.statistics, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
