"""What a number of seeds can resolve: power of the two-sided paired t test. NumPy and SciPy only.

Exact for normal differences. The standard deviation is taken as known; where it is an estimate from a few
seeds, the answers are as uncertain as it is.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import chdtr, chdtri, ncfdtr, ndtri, stdtrit

MOST_SEEDS = 10**9
LARGE_NONCENTRALITY = 1e4  # the mean's own scatter is 10^-4 of it; SciPy's function fails from about 10^5


def smallest_detectable_difference(
    standard_deviation: float, seeds: int, *, power: float, significance: float
) -> float:
    """The true mean difference that the test finds with the given probability; infinite with one seed.

    Args:
        standard_deviation: of the differences first - second over seeds, in any unit, that of the result.
        seeds: pairs of runs.
        power: probability of p <= significance at that difference, above the significance.
        significance: of the two-sided test, for example 0.05.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(standard_deviation, power, significance)
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if seeds == 1:  # no spread to test against: no difference is ever found
        return math.inf
    freedom = seeds - 1
    # rejected at least where neither the spread nor the mean is in a tail of half the risk
    half_risk = (1 - power) / 2
    critical = float(stdtrit(freedom, 1 - significance / 2))
    highest = critical * math.sqrt(chdtri(freedom, half_risk) / freedom) - float(ndtri(half_risk))
    noncentrality = brentq(lambda delta: _power(delta, seeds, significance) - power, 0, highest, xtol=1e-12)
    return float(noncentrality) * standard_deviation / math.sqrt(seeds)


def seeds_needed(difference: float, standard_deviation: float, *, power: float, significance: float) -> int:
    """The fewest seeds, at least 2, with which the test finds a true mean difference with that probability.

    Args:
        difference: true mean difference, positive; the test is two-sided, so its sign is of no effect.
        standard_deviation: of the differences over seeds, in the same unit.
        power: probability of p <= significance at that difference, above the significance.
        significance: of the two-sided test, for example 0.05.

    Raises:
        ValueError: an argument is out of its range, or a thousand million seeds are too few.
    """
    _check(standard_deviation, power, significance)
    if not 0 < difference < math.inf:
        raise ValueError(f"difference: expected a positive number, got {difference}")
    if standard_deviation == 0:
        return 2

    def enough(seeds: int) -> bool:
        return _power(difference / standard_deviation * math.sqrt(seeds), seeds, significance) >= power

    high = 2
    while not enough(high):
        if high > MOST_SEEDS:
            raise ValueError(f"difference: expected one that {MOST_SEEDS} seeds can find, got {difference}")
        high *= 2
    low = high // 2  # too few, or 1: power rises with seeds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _power(noncentrality: float, seeds: int, significance: float) -> float:
    """Probability of rejection, on either side, where the t statistic has this noncentrality.

    The square of noncentral t is noncentral F: one accurate function in place of two tails of noncentral t,
    of which SciPy's is NaN where it is very small.
    """
    freedom = seeds - 1
    critical = float(stdtrit(freedom, 1 - significance / 2))
    if noncentrality > LARGE_NONCENTRALITY:  # the sample's spread alone decides
        return float(chdtr(freedom, freedom * (noncentrality / critical) ** 2))
    return 1 - float(ncfdtr(1, freedom, noncentrality**2, critical**2))


def _check(standard_deviation: float, power: float, significance: float) -> None:
    if not 0 <= standard_deviation < math.inf:
        raise ValueError(f"standard_deviation: expected a number of at least 0, got {standard_deviation}")
    if not 0 < significance < 1:
        raise ValueError(f"significance: expected a number between 0 and 1, got {significance}")
    if not significance < power < 1:
        raise ValueError(f"power: expected a number between {significance} and 1, got {power}")
