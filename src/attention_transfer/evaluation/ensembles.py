"""Two models as one, and how alike their mistakes are."""

from __future__ import annotations

import math

from torch import Tensor

from attention_transfer.evaluation.metrics import check, check_logits, correct


def combine(first: Tensor, second: Tensor) -> Tensor:
    """Average of the two models' predicted probabilities: (examples, classes), float64.

    Args:
        first, second: logits of the same examples, (examples, classes), floating point, finite.

    Raises:
        ValueError: shapes, types or values are not as above.
    """
    check_logits(first, "first")
    check_logits(second, "second")
    if first.shape != second.shape:
        raise ValueError(f"second: expected shape {tuple(first.shape)}, got {tuple(second.shape)}")
    return (first.double().softmax(dim=1) + second.double().softmax(dim=1)) / 2


def compare_members(first: Tensor, second: Tensor, labels: Tensor) -> dict[str, float]:
    """The ensemble of two models beside its members.

    - accuracy, first_accuracy, second_accuracy: top-1 of the ensemble and of each member.
    - gain: accuracy of the ensemble over that of the better member.
    - disagreement: share of examples for which the members' top-1 classes differ.
    - error_consistency: Cohen's kappa of the members being right or wrong on the same examples (Geirhos et
      al., 2020, eq. 1): 1 alike, 0 as by chance at their accuracies, negative if they complement each other.
      NaN where chance explains everything: both members always right, or both always wrong.

    Args:
        first, second: logits of the same examples, (examples, classes), floating point, finite.
        labels: (examples,), int64.

    Raises:
        ValueError: shapes, types or values are not as above.
    """
    ensemble = combine(first, second)
    check(ensemble, labels)
    first_right, second_right = correct(first, labels), correct(second, labels)
    examples = len(labels)
    rights = int(first_right.sum()), int(second_right.sum())
    hits = int(correct(ensemble, labels).sum())
    return {
        "accuracy": hits / examples,
        "first_accuracy": rights[0] / examples,
        "second_accuracy": rights[1] / examples,
        "gain": (hits - max(rights)) / examples,
        "disagreement": float((first.argmax(dim=1) != second.argmax(dim=1)).double().mean()),
        "error_consistency": _kappa(int((first_right == second_right).sum()), *rights, examples),
    }


def _kappa(alike: int, first_right: int, second_right: int, examples: int) -> float:
    """(observed - expected) / (1 - expected) agreement, both times examples^2: whole numbers, hence exact."""
    expected = first_right * second_right + (examples - first_right) * (examples - second_right)
    if expected == examples**2:
        return math.nan
    return (alike * examples - expected) / (examples**2 - expected)
