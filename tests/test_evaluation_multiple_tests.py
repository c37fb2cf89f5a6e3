"""Paired tests against SciPy, Holm against its definition, effect sizes against quadrature and simulation."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from attention_transfer.evaluation.multiple_tests import (
    LARGE_EFFECT,
    Alternative,
    EffectSize,
    effect_size,
    holm,
    paired_t,
)

ALTERNATIVES: tuple[Alternative, ...] = ("two-sided", "greater", "less")
SIMULATIONS = 1000


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 12),
    gain=st.floats(-0.1, 0.1),
    side=st.sampled_from(ALTERNATIVES),
)
def test_paired_t_is_scipys(seed: int, n: int, gain: float, side: Alternative) -> None:
    first, second = np.random.default_rng(seed).normal(0.8, 0.02, (2, n))
    first += gain
    expected = stats.ttest_rel(first, second, alternative=side).pvalue
    assert paired_t(first, second, alternative=side) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    ("gain", "expected"),
    [(0.25, (0.0, 0.0, 1.0)), (-0.25, (0.0, 1.0, 0.0)), (0.0, (1.0, 1.0, 1.0))],
    ids=["above", "below", "equal"],
)
def test_paired_t_without_spread_is_the_limit(gain: float, expected: tuple[float, ...]) -> None:
    """0.1 and 0.3 have no exact binary form: their differences are equal but for rounding."""
    second = np.array([0.1, 0.3, 0.7])
    assert tuple(paired_t(second + gain, second, alternative=side) for side in ALTERNATIVES) == expected
    if gain:
        nearly = second + gain * np.array([1, 1 + 1e-6, 1 - 1e-6])
        found = [paired_t(nearly, second, alternative=side) for side in ALTERNATIVES]
        assert found == pytest.approx(expected, abs=1e-9)
    else:
        assert paired_t(second + np.array([1e-16, 0, 0]), second, alternative="greater") == 1.0


def test_one_seed_tests_nothing() -> None:
    assert all(math.isnan(paired_t([0.9], [0.1], alternative=side)) for side in ALTERNATIVES)
    found = effect_size([0.9], [0.1], 0.95)
    assert np.isnan([found.mean, found.low, found.high, found.uncorrected]).all()
    assert found.n == 1


def step_down(p_values: dict[str, float], alpha: float) -> set[str]:
    """Holm's procedure word for word: smallest p first, against alpha/m, alpha/(m - 1) .., until one fails."""
    rejected: set[str] = set()
    for name in sorted(
        (name for name, p in p_values.items() if not math.isnan(p)), key=lambda name: p_values[name]
    ):
        if p_values[name] > alpha / (len(p_values) - len(rejected)):
            break
        rejected.add(name)
    return rejected


P_VALUES = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.01, 1.0, math.nan])), max_size=8)


@settings(deadline=None, max_examples=100)
@given(values=P_VALUES, alpha=st.floats(0.001, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(values: list[float], alpha: float) -> None:
    family = {str(index): value for index, value in enumerate(values)}
    adjusted = holm(family)
    assert list(adjusted) == list(family)
    # a threshold that a rounding away from alpha decides tells nothing
    if not any(abs(p - alpha) < 1e-12 for p in adjusted.values()):
        assert {name for name, p in adjusted.items() if p <= alpha} == step_down(family, alpha)
    assert {name for name, p in adjusted.items() if math.isnan(p)} == {
        n for n, p in family.items() if math.isnan(p)
    }
    tested = sorted((p, adjusted[name]) for name, p in family.items() if not math.isnan(p))
    assert all(raw <= new <= 1 for raw, new in tested)
    assert all(before <= after for (_, before), (_, after) in itertools.pairwise(tested))


def test_holm_by_hand() -> None:
    family = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(family) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"alone": 0.04}) == {"alone": 0.04}
    assert holm({}) == {}


def test_an_untestable_claim_makes_nothing_easier() -> None:
    """Whatever its p-value turns out to be, the others' adjusted p-values can only fall or stay."""
    now = holm({"a": 0.01, "missing": math.nan, "b": 0.04})
    assert math.isnan(now["missing"])
    assert (now["a"], now["b"]) == pytest.approx((0.03, 0.08))
    for p in (0.0, 0.02, 0.5, 1.0):
        later = holm({"a": 0.01, "missing": p, "b": 0.04})
        assert later["a"] <= now["a"]
        assert later["b"] <= now["b"]


def test_holm_keeps_the_family_wise_error_rate() -> None:
    """Eight true null hypotheses that share their scratch runs, and so are dependent."""
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(SIMULATIONS):
        scratch, *methods = rng.normal(0, 1, (9, 5))
        adjusted = holm(
            {str(i): paired_t(m, scratch, alternative="two-sided") for i, m in enumerate(methods)}
        )
        errors += min(adjusted.values()) <= 0.05
    assert 0.01 < errors / SIMULATIONS < 0.05 + 4 * math.sqrt(0.05 * 0.95 / SIMULATIONS)


def noncentral_t(t: float, freedom: int, noncentrality: float) -> float:
    """P(T <= t) as the mean of Phi(t s - delta) over s = sqrt(chi^2 / freedom), by quadrature."""
    spread = stats.chi(freedom, scale=1 / math.sqrt(freedom))
    points = np.unique(np.clip([(noncentrality + k) / t for k in (-8, -3, 0, 3, 8)], 0, 12)) if t else None
    return float(
        quad(
            lambda s: stats.norm.cdf(t * s - noncentrality) * spread.pdf(s), 0, 12, points=points, limit=200
        )[0]
    )


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("effect", [0.0, 0.3, -1.5, 8.0])
def test_effect_size_ends_where_noncentral_t_has_its_quantiles(n: int, effect: float) -> None:
    noise = np.linspace(-1, 1, n)
    first = effect * noise.std(ddof=1) + noise
    found = effect_size(first, np.zeros(n), 0.9)
    assert found.uncorrected == pytest.approx(effect, abs=1e-12)
    t = effect * math.sqrt(n)
    ends = [noncentral_t(t, n - 1, end * math.sqrt(n)) for end in (found.low, found.high)]
    assert ends == pytest.approx([0.95, 0.05], abs=1e-7)


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(2, 100),
    t=st.one_of(st.floats(0, 10), st.floats(10, 3000)),
    confidence=st.sampled_from([0.5, 0.8, 0.95, 0.999]),
)
def test_effect_size_has_an_interval_at_every_t(n: int, t: float, confidence: float) -> None:
    noise = np.linspace(-1, 1, n)
    first = noise + t / math.sqrt(n) * noise.std(ddof=1)
    found = effect_size(first, np.zeros(n), confidence)
    assert -math.inf < found.low <= found.uncorrected <= found.high < math.inf
    mirrored = effect_size(np.zeros(n), first, confidence)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), rel=1e-9, abs=1e-9)
    scaled = effect_size(7 * first + 3, np.full(n, 3.0), confidence)
    assert (scaled.mean, scaled.low, scaled.high) == pytest.approx(
        (found.mean, found.low, found.high), rel=1e-6, abs=1e-6, nan_ok=n == 2
    )


def test_effect_size_agrees_with_the_t_test() -> None:
    """Zero is in the interval exactly where the two-sided test does not reject."""
    rng = np.random.default_rng(1)
    outcomes = set()
    for _ in range(200):
        first, second = rng.normal([[0.7], [0.0]], 1, (2, 6))
        found = effect_size(first, second, 0.95)
        rejected = paired_t(first, second, alternative="two-sided") < 0.05
        assert rejected == (not found.low <= 0 <= found.high)
        outcomes.add(rejected)
    assert outcomes == {True, False}


@pytest.mark.parametrize("n", [3, 8])
def test_effect_size_covers_and_is_unbiased(n: int) -> None:
    rng, true = np.random.default_rng(n), 0.8
    found = [effect_size(row, np.zeros(n), 0.9) for row in rng.normal(true, 1, (SIMULATIONS, n))]
    coverage = np.mean([interval.low <= true <= interval.high for interval in found])
    assert coverage == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / SIMULATIONS))
    if n == 8:  # with 3 seeds the variance of the estimate is infinite, and its mean says nothing
        means = np.array([interval.mean for interval in found])
        assert means.mean() == pytest.approx(true, abs=4 * means.std() / math.sqrt(SIMULATIONS))
        uncorrected = np.mean([interval.uncorrected for interval in found])
        assert uncorrected > true + 4 * means.std() / math.sqrt(SIMULATIONS)


def test_hedges_correction_by_hand() -> None:
    """J(4) = gamma(2) / (sqrt(2) gamma(3/2)) = sqrt(2 / pi); J(2) = sqrt(1 / pi)."""
    five = effect_size([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5, 0.95)
    assert five.mean == pytest.approx(3 / math.sqrt(2.5) * math.sqrt(2 / math.pi))
    three = effect_size([1.0, 2.0, 3.0], [0.0] * 3, 0.95)
    assert (three.uncorrected, three.mean) == pytest.approx((2.0, 2 / math.sqrt(math.pi)))


def test_effect_size_of_two_seeds_has_an_interval_and_no_mean() -> None:
    found = effect_size([1.0, 2.0], [0.0, 0.0], 0.95)
    assert math.isnan(found.mean)
    assert found.uncorrected == pytest.approx(1.5 / math.sqrt(0.5))
    assert found.low < found.uncorrected < found.high


@pytest.mark.parametrize("gain", [0.0, 0.25], ids=["equal", "shifted"])
def test_effect_size_without_spread_has_no_unit(gain: float) -> None:
    second = np.array([0.1, 0.3, 0.7])
    found = effect_size(second + gain, second, 0.95)
    assert np.isnan([found.mean, found.low, found.high, found.uncorrected]).all()
    assert found.n == 3


def test_the_limit_of_large_effects_joins_the_exact_interval() -> None:
    noise = np.array([-1.0, 0.5, 0.2, -0.4, 0.7])
    noise -= noise.mean()

    def at(effect: float) -> EffectSize:
        return effect_size(noise / noise.std(ddof=1) + effect, np.zeros(5), 0.95)

    exact, limit = at(0.999 * LARGE_EFFECT), at(1.001 * LARGE_EFFECT)
    growth = 1.001 / 0.999
    assert (limit.low, limit.high) == pytest.approx((growth * exact.low, growth * exact.high), rel=1e-5)
    far = at(1e9)
    assert far.low < 1e9 < far.high < math.inf


def test_unsound_input_is_refused() -> None:
    for use, message in (
        (
            lambda: paired_t([1.0, 2.0], [1.0], alternative="less"),
            "second: expected 2 values, one per seed, got 1",
        ),
        (
            lambda: paired_t([1.0], [1.0], alternative="both"),
            "alternative: expected one of two-sided, .* got 'both'",
        ),  # type: ignore[arg-type]
        (lambda: effect_size([1.0], [math.inf], 0.9), "second: expected finite values"),
        (lambda: effect_size([1.0], [1.0], 95), "confidence: expected a number between 0 and 1, got 95"),
        (lambda: holm({"good": 0.1, "bad": 1.1}), "bad: expected a p-value between 0 and 1, or NaN, got 1.1"),
        (lambda: holm({"bad": -0.1}), "bad: expected a p-value"),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.slow
def test_what_the_report_needs_comes_without_torch() -> None:
    names = ("multiple_tests", "power", "robustness", "variance")
    program = "; ".join(f"import attention_transfer.evaluation.{name}" for name in names)
    program += "; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
