"""Attention Distill: the student learns maps like the teacher's and then stands alone (paper A, section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer.models.attention import read
from attention_transfer.transfer.losses import streamed_attention_cross_entropy
from attention_transfer.transfer.method import Loss


class AttentionDistill:
    """Task loss plus `weight` times the cross-entropy of the maps.

    Args:
        layers: same layer to same layer, same head to same head.
        reduction: of the attention loss over the layers.
    """

    teacher_at_inference = False

    def __init__(
        self,
        student: nn.Module,
        *,
        layers: tuple[int, ...],
        weight: float,
        reduction: Literal["sum", "mean"],
        label_smoothing: float,
    ) -> None:
        self.student = student
        self.layers = layers
        self.weight = weight
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def train(self) -> None:
        self.student.train()

    def loss(self, images: Tensor, labels: Tensor, attention: Tensor | None) -> Loss:
        if attention is None:
            raise ValueError("Attention Distill needs the teacher's attention in training")
        with read(self.student, self.layers) as own:
            logits = self.student(images)
        task = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        pairs = [(attention[:, :, index], own[layer]) for index, layer in enumerate(self.layers)]
        layers = torch.stack(
            [
                streamed_attention_cross_entropy(teacher, *student.queries_and_keys())
                for teacher, student in pairs
            ]
        )
        loss = layers.sum() if self.reduction == "sum" else layers.mean()
        return Loss(total=task + self.weight * loss, task=task, attention=loss)

    def logits(self, student: nn.Module, images: Tensor, attention: Tensor | None) -> Tensor:
        return student(images)
