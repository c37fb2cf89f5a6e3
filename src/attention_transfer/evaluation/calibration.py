"""Temperature scaling: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2."""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

from attention_transfer.evaluation.metrics import check, check_logits

LOWEST, HIGHEST = 1e-3, 1e3


class NoTemperatureError(ValueError):
    """These logits have no best temperature, or one that means nothing."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T at which softmax(logits / T) has the lowest mean negative log-likelihood.

    Fit on validation logits, never on those that are then scored. The likelihood is convex in 1/T, so its
    derivative has one zero at most, found to 10^-10 of T, in float64. There is one exactly where the mean
    logit of the labels lies between the mean over all classes and the mean of the highest logits. Otherwise
    there is nothing to return, and an edge of a range in its place would look like a fit:

    - if every example is right, the best temperature is 0, certainty, which no other data set confirms;
    - if the labels' logits are no higher than the average class's, it is infinite: chance predicts better.

    Args:
        logits: (examples, classes), floating point, finite.
        labels: (examples,), int64.

    Raises:
        NoTemperatureError: there is no finite best temperature above 0, or it lies outside 0.001 to 1000, where it
            hangs on a few examples with next to no margin.
        ValueError: shapes, types or values are not as above.
    """
    check(logits, labels)
    below_highest = logits.double()
    below_highest = below_highest - below_highest.amax(dim=1, keepdim=True)
    of_labels = float(below_highest.gather(1, labels[:, None]).mean())
    if of_labels == 0:
        raise NoTemperatureError(
            "no temperature: expected an example whose label has not the highest logit, got none in "
            f"{len(labels)} examples; the likelihood rises until the temperature is 0"
        )
    if of_labels <= float(below_highest.mean()):
        raise NoTemperatureError(
            "no temperature: expected labels with higher logits than the average class, got "
            f"{of_labels - float(below_highest.mean()):.3g} more; the likelihood rises with the temperature"
        )

    def slope(log_inverse: float) -> float:
        """Derivative of the mean negative log-likelihood by 1/T: it rises with 1/T."""
        probabilities = (below_highest * math.exp(log_inverse)).softmax(dim=1)
        return float(torch.linalg.vecdot(probabilities, below_highest).mean()) - of_labels

    low, high = -math.log(HIGHEST), -math.log(LOWEST)
    if not slope(low) <= 0 <= slope(high):
        side = f"above {HIGHEST:g}" if slope(low) > 0 else f"below {LOWEST:g}"
        raise NoTemperatureError(
            f"temperature: expected one between {LOWEST:g} and {HIGHEST:g}, got one {side}"
        )
    return math.exp(-float(brentq(slope, low, high, xtol=1e-10)))


def rescaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float64: stored half-precision logits could overflow. The ranking is the same.

    Args:
        logits: (examples, classes), floating point, finite.
        temperature: positive.

    Raises:
        ValueError: logits are not as above, or the temperature is not a positive number.
    """
    check_logits(logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return logits.double() / temperature
