"""Power against published sample sizes, quadrature and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from attention_transfer.evaluation.power import seeds_needed, smallest_detectable_difference

SIMULATIONS = 20000


@pytest.mark.parametrize(
    ("effect", "power", "seeds"),
    [(0.2, 0.8, 199), (0.5, 0.8, 34), (0.8, 0.8, 15), (0.5, 0.95, 54), (0.8, 0.95, 23)],
)
def test_seeds_needed_are_those_of_g_power(effect: float, power: float, seeds: int) -> None:
    """Faul et al., G*Power 3: matched pairs, two-sided, alpha 0.05."""
    assert seeds_needed(effect, 1.0, power=power, significance=0.05) == seeds


def rejections(difference: float, deviation: float, seeds: int, significance: float) -> float:
    """Share of simulated studies in which SciPy's two-sided t test rejects."""
    draws = np.random.default_rng(seeds).normal(difference, deviation, (SIMULATIONS, seeds))
    return float((stats.ttest_1samp(draws, 0, axis=1).pvalue <= significance).mean())


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
@pytest.mark.parametrize(("power", "significance"), [(0.8, 0.05), (0.5, 0.01), (0.25, 0.2)])
def test_the_difference_is_detected_as_often_as_promised(
    seeds: int, power: float, significance: float
) -> None:
    found = smallest_detectable_difference(0.03, seeds, power=power, significance=significance)
    share = rejections(found, 0.03, seeds, significance)
    assert share == pytest.approx(power, abs=4 * math.sqrt(power * (1 - power) / SIMULATIONS))


@pytest.mark.parametrize(("power", "significance"), [(0.8, 0.05), (0.9, 0.01)])
def test_many_seeds_are_a_z_test(power: float, significance: float) -> None:
    found = smallest_detectable_difference(2.0, 10**6, power=power, significance=significance)
    z = stats.norm.ppf(1 - significance / 2) + stats.norm.ppf(power)
    assert found == pytest.approx(z * 2.0 / 1000, rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    seeds=st.integers(2, 500),
    power=st.floats(0.3, 0.999),
    significance=st.sampled_from([0.2, 0.05, 0.001]),
    deviation=st.floats(1e-4, 10),
)
def test_the_two_functions_are_inverse(
    seeds: int, power: float, significance: float, deviation: float
) -> None:
    found = smallest_detectable_difference(deviation, seeds, power=power, significance=significance)
    above, below = (
        seeds_needed(factor * found, deviation, power=power, significance=significance)
        for factor in (1 + 1e-9, 1 - 1e-9)
    )
    assert (above, below) == (seeds, seeds + 1)
    # more seeds find smaller differences, a higher power needs a larger one, and the unit goes through
    more = smallest_detectable_difference(deviation, seeds + 1, power=power, significance=significance)
    surer = smallest_detectable_difference(deviation, seeds, power=(1 + power) / 2, significance=significance)
    scaled = smallest_detectable_difference(100 * deviation, seeds, power=power, significance=significance)
    assert more < found < surer
    assert scaled == pytest.approx(100 * found)


@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize(("power", "significance"), [(0.8, 0.05), (0.99, 0.001), (0.051, 0.05)])
def test_power_by_quadrature(seeds: int, power: float, significance: float) -> None:
    """Given the sample's standard deviation s, the mean is beyond its critical value with a normal probability."""
    found = smallest_detectable_difference(3.0, seeds, power=power, significance=significance)
    noncentrality = found / 3.0 * math.sqrt(seeds)
    critical = stats.t.isf(significance / 2, seeds - 1)
    spread = stats.chi(seeds - 1, scale=1 / math.sqrt(seeds - 1))

    def rejected(s: float) -> float:
        both = stats.norm.cdf(noncentrality - critical * s) + stats.norm.cdf(-noncentrality - critical * s)
        return float(both * spread.pdf(s))

    points = np.unique([(noncentrality + k) / critical for k in (-4, 0, 4) if noncentrality + k > 0])
    assert quad(rejected, 0, 12, points=points, limit=200)[0] == pytest.approx(power, abs=1e-7)


@pytest.mark.parametrize("power", [0.1, 0.2, 0.9], ids=str)
def test_two_seeds_at_a_tiny_significance(power: float) -> None:
    """A critical value of 63662: the test finds delta where |Y| < delta / 63662, Y standard normal."""
    found = smallest_detectable_difference(1.0, 2, power=power, significance=1e-5)
    critical = 1 / math.tan(math.pi * 1e-5 / 2)  # Student's t of one degree of freedom is Cauchy's
    assert found == pytest.approx(critical * stats.norm.ppf((1 + power) / 2) / math.sqrt(2), rel=1e-6)


def test_the_edges() -> None:
    assert smallest_detectable_difference(0.02, 1, power=0.8, significance=0.05) == math.inf
    assert smallest_detectable_difference(0.0, 1, power=0.8, significance=0.05) == math.inf
    assert smallest_detectable_difference(0.0, 3, power=0.8, significance=0.05) == 0.0
    assert seeds_needed(0.1, 0.0, power=0.8, significance=0.05) == 2
    assert seeds_needed(1e6, 1.0, power=0.8, significance=0.05) == 2
    assert seeds_needed(1e-3, 1.0, power=0.8, significance=0.05) == pytest.approx(2.8016**2 * 1e6, rel=1e-3)


def test_unsound_input_is_refused() -> None:
    def detectable(
        deviation: float = 1.0, seeds: int = 5, power: float = 0.8, significance: float = 0.05
    ) -> None:
        smallest_detectable_difference(deviation, seeds, power=power, significance=significance)

    for use, message in (
        (lambda: detectable(deviation=-1.0), "standard_deviation: expected a number of at least 0, got -1.0"),
        (lambda: detectable(deviation=math.nan), "standard_deviation: expected"),
        (lambda: detectable(seeds=0), "seeds: expected at least 1, got 0"),
        (lambda: detectable(power=1.0), "power: expected a number between 0.05 and 1, got 1.0"),
        (lambda: detectable(power=0.05), "power: expected a number between 0.05 and 1, got 0.05"),
        (lambda: detectable(significance=0.0), "significance: expected a number between 0 and 1, got 0.0"),
        (
            lambda: seeds_needed(0.0, 1.0, power=0.8, significance=0.05),
            "difference: expected a positive number, got 0.0",
        ),
        (
            lambda: seeds_needed(1e-6, 1.0, power=0.8, significance=0.05),
            "difference: expected one that 1000000000 seeds can find, got 1e-06",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            use()
