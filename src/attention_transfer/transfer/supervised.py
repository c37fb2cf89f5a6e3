"""Training without attention transfer: from scratch, fine-tuning, linear probe."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer.transfer.method import Given, Loss


class Supervised:
    """Cross-entropy with the labels.

    Args:
        student: a timm model; its initial weights make it scratch or fine-tune.
        trained: `all` parameters, or the `head` alone (linear probe: last norm and linear layer).
    """

    needs = None
    teacher_at_inference = False

    def __init__(
        self, student: nn.Module, *, trained: Literal["all", "head"], label_smoothing: float
    ) -> None:
        self.student = student
        self.trained = trained
        self.label_smoothing = label_smoothing
        if trained == "head":
            student.requires_grad_(False)
            for part in self._head():
                part.requires_grad_(True)

    def _head(self) -> tuple[nn.Module, nn.Module]:
        return self.student.fc_norm, self.student.head  # type: ignore[return-value]

    def train(self) -> None:
        self.student.train(self.trained == "all")

    def loss(self, images: Tensor, labels: Tensor, given: Given | None) -> Loss:
        if self.trained == "head":
            with torch.no_grad():
                features = self.student.forward_features(images)  # type: ignore[operator]
            logits = self.student.forward_head(features)  # type: ignore[operator]
        else:
            logits = self.student(images)
        task = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return Loss(total=task, task=task)

    def logits(self, student: nn.Module, images: Tensor, given: Given | None) -> Tensor:
        return student(images)
