"""The loss of Attention Distill."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F


def attention_cross_entropy(teacher: Tensor, student: Tensor, *, reduction: Literal["sum", "mean"]) -> Tensor:
    """Cross-entropy between the teacher's and the student's attention maps (paper A, section 3.2).

    -(P_teacher * log P_student) summed over the keys, mean over batch, heads and queries, at temperature
    1; over the layers the sum, as in the official code, or the mean.

    Args:
        teacher, student: scaled logits before softmax, (layers, batch, heads, queries, keys).

    Returns:
        A scalar. Its least value, for equal maps, is the entropy of the teacher's maps.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"expected student logits like the teacher's, {tuple(teacher.shape)}, got {tuple(student.shape)}"
        )
    rows = -(teacher.softmax(dim=-1) * F.log_softmax(student.float(), dim=-1)).sum(dim=-1)
    layers = rows.flatten(start_dim=1).mean(dim=1)
    return layers.sum() if reduction == "sum" else layers.mean()
