"""How models do under distribution shift, against a baseline and against a line. NumPy and SciPy only.

Errors and accuracies are shares of examples, between 0 and 1: 0.01 is one point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from attention_transfer.evaluation.statistics import Floats, Values

NEGLIGIBLE = 1e-9  # less than one example of any test set: rounding of equal shares


@dataclass(frozen=True)
class CorruptionError:
    """Errors relative to the baseline's, as ratios: 1 is the baseline, less is better."""

    mean: float
    """mCE."""
    relative_mean: float
    """Relative mCE: of the rise of the error over that on clean examples."""
    shifts: tuple[float, ...]
    """CE of each shift."""
    relative_shifts: tuple[float, ...]


@dataclass(frozen=True)
class EffectiveRobustness:
    """A line logit(accuracy under shift) = slope logit(accuracy in distribution) + intercept, and residuals."""

    slope: float
    intercept: float
    r2: float
    """Share of the variance of logit(accuracy under shift) that the line explains; NaN where there is none."""
    residual_standard_deviation: float
    """Of the models that the line is fitted to, in logits, with n - 2 degrees of freedom."""
    models: int
    """That the line is fitted to."""
    residuals: tuple[float, ...]
    """Accuracy under shift beyond the line of each model judged, in shares of examples."""


def corruption_error(
    errors: npt.ArrayLike, baseline_errors: npt.ArrayLike, *, clean_error: float, baseline_clean_error: float
) -> CorruptionError:
    """mCE and relative mCE: Hendrycks and Dietterich, ICLR 2019, section 4.2.

    CE of a shift is the sum of errors over severities, over the same sum of the baseline; relative CE takes
    the clean error off every term. The baseline is the scratch model here and AlexNet in the paper, so the
    numbers are not comparable with published ones. A shift under which the baseline makes no error has no CE,
    and one under which its error does not rise has no relative CE: both are NaN, and so is then their mean,
    for a mean of the other shifts would be one of easier or of harder shifts.

    Args:
        errors, baseline_errors: (shifts, severities), the same shifts and severities in both.
        clean_error, baseline_clean_error: on the test set without shift.

    Raises:
        ValueError: shapes differ or are not as above, or an error is not between 0 and 1.
    """
    sums = []
    for name, values, clean in (
        ("errors", errors, clean_error),
        ("baseline_errors", baseline_errors, baseline_clean_error),
    ):
        array = _shares(name, values)
        if array.ndim != 2 or array.size == 0:
            raise ValueError(f"{name}: expected (shifts, severities), got {array.shape}")
        if not 0 <= clean <= 1:
            raise ValueError(f"clean error of {name}: expected a number between 0 and 1, got {clean}")
        sums.append((array.shape, array.mean(axis=1), (array - clean).mean(axis=1)))
    (shape, error, rise), (baseline_shape, baseline_error, baseline_rise) = sums
    if shape != baseline_shape:
        raise ValueError(f"baseline_errors: expected shape {shape}, got {baseline_shape}")
    ratio, relative = _ratio(error, baseline_error), _ratio(rise, baseline_rise)
    return CorruptionError(
        float(ratio.mean()), float(relative.mean()), tuple(ratio.tolist()), tuple(relative.tolist())
    )


def effective_robustness(
    fit_in: Values,
    fit_out: Values,
    model_in: Values,
    model_out: Values,
    *,
    examples_in: int,
    examples_out: int,
) -> EffectiveRobustness:
    """Accuracy under shift beyond what accuracy in distribution predicts.

    Taori et al., NeurIPS 2020, with the line fitted by least squares in logit space as there; Miller
    et al., ICML 2021, for how well such lines fit. The list of models that the line is fitted to is part of
    the result and must be stated with it: a model that is in the list pulls the line towards itself.

    Accuracies that go through the logit are first held at least half an example away from 0 and 1.

    Args:
        fit_in, fit_out: accuracy in distribution and under shift of each model that the line is fitted to.
        model_in, model_out: the same of each model to be judged.
        examples_in, examples_out: sizes of the two test sets.

    Raises:
        ValueError: lengths differ, a value is not between 0 and 1, a size is below 1, fewer than 3 models to
            fit, or all of them with the same accuracy in distribution.
    """
    if min(examples_in, examples_out) < 1:
        raise ValueError(f"examples: expected at least 1 in both sets, got {examples_in} and {examples_out}")
    fit_in, fit_out = _accuracies(fit_in=fit_in, fit_out=fit_out)
    model_in, model_out = _accuracies(model_in=model_in, model_out=model_out)
    if len(fit_in) < 3:
        raise ValueError(f"fit_in: expected at least 3 models, got {len(fit_in)}")
    x, y = _logit(fit_in, examples_in), _logit(fit_out, examples_out)
    if _equal(x):
        raise ValueError(f"fit_in: expected models of different accuracy, got {fit_in.tolist()}")
    x_centred, y_centred = x - x.mean(), y - y.mean()
    slope = float(x_centred @ y_centred / (x_centred @ x_centred))
    intercept = float(y.mean() - slope * x.mean())
    unexplained = float(np.square(y_centred - slope * x_centred).sum())
    total = float(np.square(y_centred).sum())
    predicted = expit(slope * _logit(model_in, examples_in) + intercept)
    return EffectiveRobustness(
        slope=slope,
        intercept=intercept,
        r2=math.nan if _equal(y) else 1 - unexplained / total,
        residual_standard_deviation=math.sqrt(unexplained / (len(x) - 2)),
        models=len(x),
        residuals=tuple((model_out - predicted).tolist()),
    )


def _ratio(values: Floats, baseline: Floats) -> Floats:
    """values / baseline; NaN where the baseline is not positive beyond rounding."""
    return np.divide(values, baseline, out=np.full_like(values, np.nan), where=baseline > NEGLIGIBLE)


def _equal(logits: Floats) -> bool:
    """Whether the accuracies are the same but for rounding; those beyond the clipping are the same."""
    return bool(np.ptp(expit(logits)) < NEGLIGIBLE)


def _logit(accuracies: Floats, examples: int) -> Floats:
    half = 0.5 / examples
    return np.asarray(logit(np.clip(accuracies, half, 1 - half)))


def _shares(name: str, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name}: expected shares between 0 and 1, got {array.tolist()}")
    return array


def _accuracies(**accuracies: Values) -> list[Floats]:
    """The accuracies as arrays of one length; ValueError names the one that does not fit."""
    arrays = [_shares(name, values) for name, values in accuracies.items()]
    first = arrays[0].shape
    for name, array in zip(accuracies, arrays, strict=True):
        if array.ndim != 1 or len(array) == 0 or array.shape != first:
            raise ValueError(f"{name}: expected one value per model, as many in both, got {array.shape}")
    return arrays
