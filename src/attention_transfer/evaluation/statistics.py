"""How sure a mean, a difference or a ratio is, over seeds and over examples. NumPy and SciPy only.

Sequences are one value per seed. Where two or three of them are compared, position i is the same seed in
each: all comparisons are paired. Intervals are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

Floats = npt.NDArray[np.float64]
Values = Sequence[float] | Floats
BLOCK = 2**20  # counts held at a time by the bootstrap


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval of confidence; low and high are NaN where one seed gives no spread."""

    mean: float
    low: float
    high: float
    n: int
    """Seeds."""


@dataclass(frozen=True)
class PairedDifference(Interval):
    """Mean of the differences first - second, with its interval."""

    standard_error: float
    """Of the mean difference; NaN with one seed."""


@dataclass(frozen=True)
class Equivalence:
    """Outcome of two one-sided tests."""

    p_value: float
    equivalent: bool


def mean_interval(values: Values, confidence: float) -> Interval:
    """Mean over seeds with Student's t interval. With one seed, low and high are NaN.

    Raises:
        ValueError: no value, a value that is not finite, or a confidence outside (0, 1).
    """
    [sample] = as_pairs(values=values)
    mean, error = _mean_and_error(sample)
    half = _quantile(confidence, len(sample)) * error
    return Interval(mean, mean - half, mean + half, len(sample))


def paired_difference(first: Values, second: Values, confidence: float) -> PairedDifference:
    """Mean of first - second with Student's t interval of the differences of each seed.

    With one seed, low, high and the standard error are NaN.

    Raises:
        ValueError: different lengths, no value, a value that is not finite, or a confidence outside (0, 1).
    """
    first, second = as_pairs(first=first, second=second)
    mean, error = _mean_and_error(first - second)
    half = _quantile(confidence, len(first)) * error
    return PairedDifference(mean, mean - half, mean + half, len(first), error)


def gap_recovered(method: Values, scratch: Values, finetune: Values, confidence: float) -> Interval:
    """(mean(method) - mean(scratch)) / (mean(finetune) - mean(scratch)) with Fieller's interval.

    Fieller (1954): the ratios r for which a t test does not reject that the mean of
    (method - scratch) - r (finetune - scratch) is zero. Both differences of a seed share its scratch value;
    their covariance over seeds is part of the test. Exact for normal differences.

    Where finetune - scratch is itself not significantly different from zero at this confidence, Fieller's set
    is unbounded, and the interval is (-inf, inf). With one seed, low and high are NaN. The ratio is NaN if
    the two means in the denominator are equal.

    Raises:
        ValueError: different lengths, no value, a value that is not finite, or a confidence outside (0, 1).
    """
    method, scratch, finetune = as_pairs(method=method, scratch=scratch, finetune=finetune)
    n = len(method)
    gains = np.stack([method - scratch, finetune - scratch])
    top, bottom = (float(gain) for gain in gains.mean(axis=1))
    ratio = top / bottom if bottom else math.nan
    t = _quantile(confidence, n)
    if n == 1:
        return Interval(ratio, math.nan, math.nan, n)
    covariance = np.cov(gains) * t**2 / n
    top_spread, bottom_spread, shared = (float(covariance[at]) for at in ((0, 0), (1, 1), (0, 1)))
    # the set is: square * r^2 - 2 * linear * r + (top^2 - top_spread) <= 0
    square = bottom**2 - bottom_spread
    if square <= 0:
        return Interval(ratio, -math.inf, math.inf, n)
    linear = top * bottom - shared
    # linear^2 - square * (top^2 - top_spread), multiplied out: top^2 bottom^2 would cancel all digits
    discriminant = (bottom_spread * top**2 - 2 * shared * top * bottom + top_spread * bottom**2) - (
        top_spread * bottom_spread - shared**2
    )
    half = math.sqrt(max(discriminant, 0.0))  # not negative but for rounding: the ratio is in the set
    return Interval(ratio, (linear - half) / square, (linear + half) / square, n)


def hierarchical_bootstrap(
    first_correct: npt.NDArray[np.bool_],
    second_correct: npt.NDArray[np.bool_],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """Accuracy of the first method less that of the second, with a percentile bootstrap interval.

    Each resample draws seeds with replacement, and examples with replacement; both draws serve both methods,
    and the examples drawn serve all seeds, as one test set does. The interval covers new seeds and new test
    examples together. A percentile bootstrap of few seeds is somewhat too narrow in its share due to seeds
    (the variance of n seeds comes out (n - 1)/n as large); with one seed it covers examples only.

    Examples with the same outcomes in all seeds are drawn as one group, whose size in a resample is
    multinomial: the same distribution as drawing every example, at a fraction of the work. So the order of
    examples is of no effect.

    Args:
        first_correct, second_correct: (seeds, examples) bool, the same seeds and examples in both.
        resamples: bootstrap resamples, at least 1.
        confidence: of the interval, between 0 and 1.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: shapes differ or are not as above, or an argument is out of its range.
    """
    for name, array in (("first_correct", first_correct), ("second_correct", second_correct)):
        if array.ndim != 2 or array.size == 0 or array.dtype != np.bool_:
            raise ValueError(f"{name}: expected bool (seeds, examples), got {array.dtype} {array.shape}")
    if first_correct.shape != second_correct.shape:
        raise ValueError(f"second_correct: expected shape {first_correct.shape}, got {second_correct.shape}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    check_confidence(confidence)
    seeds, examples = first_correct.shape
    difference = first_correct.astype(np.int8) - second_correct.astype(np.int8)
    patterns, sizes = np.unique(difference, axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, BLOCK // len(sizes))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        group_counts = generator.multinomial(examples, sizes / examples, size=count)
        sums = np.einsum(
            "rg,rg->r", seed_counts @ patterns.astype(np.float64), group_counts.astype(np.float64)
        )
        means[start : start + count] = sums / (seeds * examples)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(difference.mean()), float(low), float(high), seeds)


def equivalent(first: Values, second: Values, margin: float, confidence: float) -> Equivalence:
    """Two one-sided paired t tests (Schuirmann, 1987) of |mean(first - second)| < margin.

    The p-value is the larger of the two; the verdict is p < 1 - confidence, which is to say that the
    two-sided interval of confidence 2 * confidence - 1 lies within the margin (90 % for 0.95). With one seed
    the p-value is NaN and the verdict is False. Differences without any spread give a p-value of 0 within
    the margin and 1 on or outside it.

    Raises:
        ValueError: different lengths, no value, a value that is not finite, a margin that is not positive, or
            a confidence outside (0, 1).
    """
    first, second = as_pairs(first=first, second=second)
    check_confidence(confidence)
    if not 0 < margin < math.inf:
        raise ValueError(f"margin: expected a positive number, got {margin}")
    mean, error = _mean_and_error(first - second)
    if error == 0:
        p_value = 0.0 if abs(mean) < margin else 1.0
    else:  # the nearer margin has the larger p-value
        p_value = float(stdtr(len(first) - 1, (abs(mean) - margin) / error)) if len(first) > 1 else math.nan
    return Equivalence(p_value, p_value < 1 - confidence)


def as_pairs(**samples: Values) -> list[Floats]:
    """The samples as float64 arrays of one length; ValueError names the one that does not fit."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in samples.items()}
    expected = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        if array.ndim != 1 or len(array) == 0:
            raise ValueError(f"{name}: expected one value per seed, at least one, got shape {array.shape}")
        if array.shape != expected:
            raise ValueError(f"{name}: expected {expected[0]} values, one per seed, got {len(array)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite values, got {array.tolist()}")
    return list(arrays.values())


def _mean_and_error(sample: Floats) -> tuple[float, float]:
    """Mean, and its standard error (NaN with one value)."""
    n = len(sample)
    return float(sample.mean()), float(sample.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def _quantile(confidence: float, n: int) -> float:
    """Student's t of a two-sided interval from n values (NaN with one value)."""
    check_confidence(confidence)
    return float(stdtrit(n - 1, (1 + confidence) / 2)) if n > 1 else math.nan


def check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
