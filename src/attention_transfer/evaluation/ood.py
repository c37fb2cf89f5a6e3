"""Can the logits tell images of another kind from those of the test set?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attention_transfer.evaluation.metrics import check_logits

Score = Literal["max_probability", "energy"]


def detect(in_logits: Tensor, out_logits: Tensor, score: Score) -> dict[str, float]:
    """Separation of in-distribution from out-of-distribution examples by one score.

    In-distribution is the positive class, and a higher score means more in-distribution:

    - max_probability: highest softmax probability (Hendrycks & Gimpel, 2017);
    - energy: logsumexp of the logits, the negative of the free energy at temperature 1 (Liu et al., 2020).

    Results:

    - auroc: probability that an in-distribution example scores higher than another; a tie counts one half.
    - fpr95: share of out-of-distribution examples that pass as in-distribution at the highest threshold that
      at least 95 % of the in-distribution examples reach. A score equal to the threshold passes, on both
      sides, so ties count against the detector.

    Args:
        in_logits: (examples, classes), floating point, finite.
        out_logits: (other examples, the same classes).
        score: max_probability or energy.

    Raises:
        ValueError: shapes, types or values are not as above.
    """
    check_logits(in_logits, "in_logits")
    check_logits(out_logits, "out_logits")
    if in_logits.shape[1] != out_logits.shape[1]:
        raise ValueError(f"out_logits: expected {in_logits.shape[1]} classes, got {out_logits.shape[1]}")
    inside, outside = _scores(in_logits, score), _scores(out_logits, score).sort().values
    # searchsorted counts, per in-distribution example, the others strictly below it and those not above it
    below, not_above = (torch.searchsorted(outside, inside, right=right) for right in (False, True))
    auroc = (below + not_above).double().mean() / 2 / len(outside)
    reached_by = -(-95 * len(inside) // 100)  # 95 % rounded up, in integers: 0.95 is no binary fraction
    threshold = inside.sort(descending=True).values[reached_by - 1]
    return {"auroc": float(auroc), "fpr95": float((outside >= threshold).double().mean())}


def _scores(logits: Tensor, score: Score) -> Tensor:
    """Scores in float64, where ties of saturated probabilities are rarest: (examples,)."""
    if score == "max_probability":
        return logits.double().softmax(dim=1).amax(dim=1)
    if score == "energy":
        return logits.double().logsumexp(dim=1)
    raise ValueError(f"score: expected max_probability or energy, got {score!r}")
