"""Tests of claims by paired seeds, their p-values within a family of claims, and how large an effect is.

NumPy and SciPy only. Position i of two sequences is the same seed in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, gammaln, nctdtr, ndtri, stdtr

from attention_transfer.evaluation.statistics import Interval, Values, as_pairs, check_confidence

Alternative = Literal["two-sided", "greater", "less"]
ALTERNATIVES = ("two-sided", "greater", "less")
ROUNDING = 4 * float(np.finfo(np.float64).eps)  # of a difference, as a share of the largest value
LARGE_EFFECT = 1000.0  # beyond, the noncentral t distribution is its limit; SciPy's fails from about 10^5


@dataclass(frozen=True)
class EffectSize(Interval):
    """Hedges' g_z as the mean, with the interval of the population's standardised difference."""

    uncorrected: float
    """Cohen's d_z: mean of the differences over their standard deviation."""


def paired_t(first: Values, second: Values, *, alternative: Alternative) -> float:
    """p-value of Student's paired t test of mean(first - second) = 0.

    With one seed the test does not exist and the p-value is NaN. Differences without any spread (within
    rounding) have the limit of ever smaller spread: 0 where their mean lies on the side of the alternative,
    else 1. With few seeds and a coarse score that happens by chance: look at n before such a p-value.

    Args:
        alternative: "two-sided", or the side of the claim: "greater" for mean(first) > mean(second).

    Raises:
        ValueError: different lengths, no value, a value that is not finite, or an unknown alternative.
    """
    if alternative not in ALTERNATIVES:
        raise ValueError(f"alternative: expected one of {', '.join(ALTERNATIVES)}, got {alternative!r}")
    n, mean, deviation = _moments(first, second)
    if n == 1:
        return math.nan
    towards = {"two-sided": abs(mean), "greater": mean, "less": -mean}[alternative]
    if deviation == 0:
        return 0.0 if towards > 0 else 1.0
    tail = float(stdtr(n - 1, -towards / (deviation / math.sqrt(n))))
    return 2 * tail if alternative == "two-sided" else tail


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of a family of claims, by name, in the order given (Holm, 1979).

    A claim is rejected at family-wise error rate alpha where its adjusted p-value is at most alpha. Holds
    under any dependence between the tests, which here share seeds and scratch runs.

    A claim that could not be tested (NaN) stays NaN and counts in the family's size: the family is what was
    to be tested, declared before the results. If it shrank with every missing run, the others would pass
    more easily where less was measured, and would have to be taken back once the run exists.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    values = np.array(list(p_values.values()), dtype=np.float64)
    for name, value in p_values.items():
        if not (0 <= value <= 1 or math.isnan(value)):
            raise ValueError(f"{name}: expected a p-value between 0 and 1, or NaN, got {value}")
    order = np.argsort(values)  # NaN last
    # the i-th smallest is one of the m - i hypotheses not yet rejected
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(np.arange(len(values), 0, -1) * values[order])
    return {name: float(value) for name, value in zip(p_values, np.minimum(adjusted, 1), strict=True)}


def effect_size(first: Values, second: Values, confidence: float) -> EffectSize:
    """Paired standardised mean difference: how many standard deviations of the differences their mean is.

    The estimate is d_z times Hedges' exact correction (Hedges, 1981), so that it is unbiased for normal
    differences: with 5 seeds, d_z is on average 25 % too far from zero. The interval is that of the population's
    standardised difference by the noncentral t distribution of sqrt(n) d_z (Steiger and Fouladi, 1997), exact
    for normal differences; it takes no correction.

    With two seeds d_z has no expectation, so no correction makes it unbiased: the mean is NaN, the interval
    is not. Without any spread (one seed, or equal differences within rounding) there is no unit to measure
    in: all but n is NaN.

    Raises:
        ValueError: different lengths, no value, a value that is not finite, or a confidence outside (0, 1).
    """
    check_confidence(confidence)
    n, mean, deviation = _moments(first, second)
    if n == 1 or deviation == 0:
        return EffectSize(math.nan, math.nan, math.nan, n, math.nan)
    effect = mean / deviation
    low, high = _noncentralities(abs(effect) * math.sqrt(n), n - 1, confidence)
    if effect < 0:  # the interval of the opposite difference is the mirror image
        low, high = -high, -low
    correction = (
        math.exp(gammaln((n - 1) / 2) - gammaln((n - 2) / 2)) / math.sqrt((n - 1) / 2) if n > 2 else math.nan
    )
    return EffectSize(effect * correction, low / math.sqrt(n), high / math.sqrt(n), n, effect)


def _moments(first: Values, second: Values) -> tuple[int, float, float]:
    """Number, mean and standard deviation of the differences; what is rounding of them is 0."""
    first, second = as_pairs(first=first, second=second)
    n = len(first)
    rounding = ROUNDING * max(np.abs(first).max(), np.abs(second).max())
    mean = float((first - second).mean())
    deviation = float((first - second).std(ddof=1)) if n > 1 else math.nan
    return n, mean if abs(mean) > rounding else 0.0, 0.0 if deviation <= rounding else deviation


def _noncentralities(t: float, freedom: int, confidence: float) -> tuple[float, float]:
    """Noncentralities at which the quantile (1 + c)/2, or (1 - c)/2, of noncentral t is t >= 0.

    T = (Z + delta)/s with s^2 = chi^2/freedom, so P(T <= t) = E Phi(t s - delta), which falls with delta.
    """
    tail = (1 - confidence) / 2

    def scaled(upper_tail: float) -> float:
        """t times the quantile of s."""
        return t * math.sqrt(chdtri(freedom, upper_tail) / freedom)

    def end(probability: float) -> float:
        return float(brentq(lambda delta: nctdtr(freedom, delta, t) - probability, *bounds, xtol=1e-12))

    if t > LARGE_EFFECT * math.sqrt(freedom + 1):  # Phi is a step on the scale of t s
        return scaled(1 - tail), scaled(tail)
    # With -z the quantile of Z at tail/2: E Phi(t s + z) >= Phi(z) > 1 - tail; and E Phi(t s - delta) < tail
    # where delta is so high that s or Z must be in a tail of tail/2. Much wider, SciPy's function is NaN.
    z = -float(ndtri(tail / 2))
    bounds = -z, scaled(tail / 2) + z
    return end(1 - tail), end(tail)
