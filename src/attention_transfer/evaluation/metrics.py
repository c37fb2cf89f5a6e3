"""Scores of one set of logits: accuracy, likelihood and calibration, summed in float64.

torchmetrics gives the same numbers (a test compares them), but it is no part of this file: importing any of
its submodules imports all of it, and its calibration error adds up in float32 and puts a confidence of
exactly 1 into a bin of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def score(logits: Tensor, labels: Tensor, *, bins: int) -> dict[str, float]:
    """Scores of a classifier on one set of labelled examples.

    - accuracy, top5: share of examples whose label is among the 1 or 5 highest logits; of equal logits the
      lower class index counts as higher, as in `torch.argmax`. top5 is absent with 5 classes or fewer.
    - nll: mean negative log-likelihood of the label, in nats.
    - brier: mean over examples of the sum over classes of (p - onehot)^2, between 0 and 2 (Brier, 1950).
    - ece: expected calibration error (Guo et al., 2017, eq. 3): |accuracy - mean confidence| in `bins`
      equally wide bins of the highest probability, ((m - 1)/bins, m/bins], weighted by their examples.

    Args:
        logits: (examples, classes), floating point, finite.
        labels: (examples,), int64.
        bins: bins of the calibration error, at least 1.

    Raises:
        ValueError: shapes, types or values are not as above.
    """
    check(logits, labels)
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    ranks = _ranks(logits, labels)
    log_probabilities = logits.double().log_softmax(dim=1)
    of_label = log_probabilities.gather(1, labels[:, None]).squeeze(1)
    probabilities = log_probabilities.exp()
    # sum of (p - onehot)^2, multiplied out: no one-hot matrix
    brier = probabilities.square().sum(dim=1) - 2 * of_label.exp() + 1
    scores = {
        "accuracy": _mean(ranks < 1),
        "nll": -_mean(of_label),
        "brier": _mean(brier),
        "ece": _calibration_error(probabilities.amax(dim=1), ranks < 1, bins),
    }
    if logits.shape[1] > 5:
        scores["top5"] = _mean(ranks < 5)
    return scores


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the highest logit is the label's: (examples,) bool; ties as in `score`.

    Args:
        logits: (examples, classes), floating point, finite.
        labels: (examples,), int64.

    Raises:
        ValueError: shapes, types or values are not as above.
    """
    check(logits, labels)
    return logits.argmax(dim=1) == labels


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Raises ValueError unless `logits` is (examples, classes), floating point, finite and not empty."""
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(f"{name}: expected (examples >= 1, classes >= 2), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"{name}: expected floating point, got {logits.dtype}")
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(f"{name}: expected finite values, got others in {int((~finite).sum())} examples")


def check(logits: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless `logits` are sound and `labels` are one valid class index per example."""
    check_logits(logits)
    examples, classes = logits.shape
    if labels.shape != (examples,):
        raise ValueError(f"labels: expected shape ({examples},), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected torch.int64, got {labels.dtype}")
    lowest, highest = (int(end) for end in labels.aminmax())
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {lowest} to {highest}")


def _ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label, (examples,); `torch.topk` leaves the order of ties open."""
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(dim=1)


def _calibration_error(confidence: Tensor, right: Tensor, bins: int) -> float:
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    gaps = torch.bincount(
        torch.bucketize(confidence, edges), weights=right.double() - confidence, minlength=bins
    )
    return float(gaps.abs().sum() / len(confidence))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
