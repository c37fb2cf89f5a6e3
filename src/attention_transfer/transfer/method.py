"""The contract of a method: what it trains, which attention it needs, its loss and its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """Losses of one batch, scalars.

    Attributes:
        total: what is minimised.
        task: cross-entropy with the labels.
        attention: cross-entropy of attention maps, before its weight; None without transfer.
    """

    total: Tensor
    task: Tensor
    attention: Tensor | None = None


class Method(Protocol):
    """One way to train a student; the training loop never learns which."""

    student: nn.Module
    """Holds every parameter that is trained."""
    layers: tuple[int, ...]
    """The teacher's layers whose attention `loss` needs, in this order; () for none."""
    teacher_at_inference: bool
    """Whether `logits` needs the teacher's attention too."""

    def train(self) -> None:
        """Puts what is trained into training mode, and nothing else."""

    def loss(self, images: Tensor, labels: Tensor, attention: Tensor | None) -> Loss:
        """Loss of a batch.

        Args:
            images: (batch, channels, size, size).
            labels: (batch,).
            attention: the teacher's queries and keys for these very images, (batch, 2, layers, heads,
                tokens, head_dim); None if `layers` is empty.
        """

    def logits(self, student: nn.Module, images: Tensor, attention: Tensor | None) -> Tensor:
        """Predictions in eval mode: (batch, classes). `student` may be an average of the weights."""
