"""The contract of a method: what it trains, what it needs of the teacher, its loss and its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from attention_transfer.models.attention import Attention
from attention_transfer.transfer.maps import Maps

TeacherAttention = Attention | Maps


@dataclass(frozen=True)
class Needs:
    """What a method needs of the teacher for each batch.

    Attributes:
        what: `attention` is that of whole layers, which every cache holds; `queries_and_keys` one of
            these alone. For the others the teacher runs in the step: `values` is attention with its
            values; `features` the residual stream behind a layer.
        layers: of the teacher, from the input; none for `logits`.
    """

    what: Literal["attention", "queries_and_keys", "values", "features", "logits"]
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Given:
    """What the frozen teacher says about a batch: the part that was needed, without gradient.

    Attributes:
        attention: of each needed layer.
        features: of each needed layer, (batch, tokens, width).
        logits: (batch, classes).
    """

    attention: tuple[TeacherAttention, ...] = ()
    features: tuple[Tensor, ...] = ()
    logits: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """Losses of one batch, scalars.

    Attributes:
        total: what is minimised.
        task: cross-entropy with the labels.
        transfer: distance to the teacher, before its weight; None without one.
        transfer_name: of its curve.
    """

    total: Tensor
    task: Tensor
    transfer: Tensor | None = None
    transfer_name: Literal["attention_loss", "feature_loss", "logit_loss"] = "attention_loss"


class Method(Protocol):
    """One way to train a student; the training loop never learns which."""

    student: nn.Module
    """Holds every parameter that is trained."""
    teacher_at_inference: bool
    """Whether `logits` needs the teacher too."""

    @property
    def needs(self) -> Needs | None:
        """What `loss` needs of the teacher; None for nothing."""

    def train(self) -> None:
        """Puts what is trained into training mode, and nothing else."""

    def loss(self, images: Tensor, labels: Tensor, given: Given | None) -> Loss:
        """Loss of a batch.

        Args:
            images: (batch, channels, size, size).
            labels: (batch,), or the classes' shares (batch, classes).
            given: what the teacher says about these very images; None if nothing is needed.
        """

    def logits(self, student: nn.Module, images: Tensor, given: Given | None) -> Tensor:
        """Predictions in eval mode: (batch, classes). `student` may be an average of the weights."""
