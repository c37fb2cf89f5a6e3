"""How good a frozen representation is: nearest neighbours, a linear probe, and the directions it uses."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**22  # similarities at a time: 32 MB in float64
ITERATIONS = 10_000  # of the linear probe at most; tens to hundreds are usual
TOLERANCE = 1e-6  # of the largest element of its gradient; at 1e-4 single predictions still change


@torch.no_grad()
def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int,
    temperature: float,
) -> float:
    """Accuracy of weighted nearest neighbours, between 0 and 1 (Wu et al., 2018, section 3.4).

    Each of the k training examples with the highest cosine similarity s votes for its class with weight
    exp(s / temperature). Of classes with equal votes the lowest index wins. Computed in float64, where only
    examples that are equal, or nearly, compete for the place of the k-th.

    Args:
        features, labels: of the training examples, (examples, width) floating point, finite, and (examples,)
            int64, not negative.
        test_features, test_labels: of the test examples, alike.
        k: neighbours, from 1 to the number of training examples.
        temperature: above 0; 0.07 in the paper.

    Raises:
        ValueError: shapes, types or values are not as above, or the features of an example are all zero.
    """
    _check(features, labels, test_features, test_labels)
    if not 1 <= k <= len(features):
        raise ValueError(f"k: expected 1 to {len(features)}, the training examples, got {k}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    training = _directions(features, "features")
    classes = int(labels.max()) + 1
    right = 0
    size = max(1, BLOCK // len(features))
    for start in range(0, len(test_features), size):
        block, block_labels = test_features[start : start + size], test_labels[start : start + size]
        similarities, neighbours = (_directions(block, "test_features") @ training.mT).topk(k, dim=1)
        # Relative to the nearest one's, so that no temperature is too low for exp.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(block), classes).scatter_add_(1, labels[neighbours], weights)
        right += int((votes.argmax(dim=1) == block_labels).sum())
    return right / len(test_labels)


def linear_probe_accuracy(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    regularisation: float,
) -> float:
    """Accuracy of multinomial logistic regression on standardised features, between 0 and 1.

    Mean and deviation of each feature are those of the training examples. The weights w and biases minimise
    mean cross-entropy + regularisation * |w|^2 / 2, a convex problem with one solution, by scikit-learn's
    L-BFGS from zero: nothing is drawn at random. Being beside the mean, the regularisation means the same
    for any number of examples. With two classes there is one weight vector, not two.

    Args:
        features, labels: of the training examples, (examples, width) floating point, finite, and (examples,)
            int64, not negative; at least two classes.
        test_features, test_labels: of the test examples, alike.
        regularisation: above 0.

    Raises:
        ValueError: shapes, types or values are not as above, or the probe does not converge.
    """
    from sklearn.exceptions import ConvergenceWarning  # seconds, and the others here need none of it
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check(features, labels, test_features, test_labels)
    if not 0 < regularisation < math.inf:
        raise ValueError(f"regularisation: expected a positive number, got {regularisation}")
    if labels.min() == labels.max():
        raise ValueError(f"labels: expected at least two classes, got only {int(labels[0])}")
    data, targets, test_data, test_targets = (
        tensor.detach().cpu().numpy()
        for tensor in (features.double(), labels, test_features.double(), test_labels)
    )
    # scikit-learn weighs the sum of the cross-entropies by C, against |w|^2 / 2.
    strength = 1 / (regularisation * len(features))
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, tol=TOLERANCE, max_iter=ITERATIONS)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            probe.fit(data, targets)
        except ConvergenceWarning as warning:
            raise ValueError(
                f"expected the linear probe to converge within {ITERATIONS} iterations at regularisation "
                f"{regularisation}: a stronger one makes it easier"
            ) from warning
    return float(probe.score(test_data, test_targets))


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """How many directions the features use: RankMe (Garrido et al., 2023, eq. 1).

    exp of the entropy of the singular values divided by their sum, of the matrix of features as it stands
    (Roy & Vetterli, 2007). Not centred, as in the paper: a mean that dwarfs all variation is a collapse,
    which centring would hide; and a complete one, all examples at one point, has rank 1 and not 0 / 0. The
    paper's epsilon against log 0 is left out, for 0 log 0 = 0.

    Args:
        features: (examples, width), floating point, finite, not all zero.

    Returns:
        From 1, all examples on one line through the origin, to min(examples, width), all directions used
        alike. Few examples make it low, so that only equal numbers of them can be compared.

    Raises:
        ValueError: shapes, types or values are not as above.
    """
    _check_features(features, "features")
    values = torch.linalg.svdvals(features.double())
    if not values.any():
        raise ValueError("features: expected some that are not zero, got zeros alone")
    return float(torch.special.entr(values / values.sum()).sum().exp())


def _directions(features: Tensor, name: str) -> Tensor:
    """Features divided by their length: (examples, width), float64."""
    features = features.double()
    if not features.any(dim=1).all():
        raise ValueError(f"{name}: expected features with a direction, got an example with zeros alone")
    return F.normalize(features, dim=1, eps=0)


def _check(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for prefix, data, targets in (("", features, labels), ("test_", test_features, test_labels)):
        _check_features(data, f"{prefix}features")
        if targets.shape != (len(data),) or targets.dtype != torch.int64:
            raise ValueError(
                f"{prefix}labels: expected torch.int64 ({len(data)},), "
                f"got {targets.dtype} {tuple(targets.shape)}"
            )
        if targets.min() < 0:
            raise ValueError(f"{prefix}labels: expected class indices, got {int(targets.min())}")
    if features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"test_features: expected width {features.shape[1]} as in training, got {test_features.shape[1]}"
        )


def _check_features(features: Tensor, name: str) -> None:
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected floating point (examples, width), none of them 0, "
            f"got {features.dtype} {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name}: expected finite features, got others")
