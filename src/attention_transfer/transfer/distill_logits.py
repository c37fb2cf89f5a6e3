"""Distillation of logits: what the teacher predicts instead of where it looks (Hinton et al., 2015)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer.transfer.method import Given, Loss, Needs


class LogitDistill:
    """Task loss plus `weight` times T^2 times the cross-entropy of both predictions at temperature T."""

    teacher_at_inference = False
    needs = Needs("logits")

    def __init__(
        self, student: nn.Module, *, weight: float, temperature: float, label_smoothing: float
    ) -> None:
        self.student = student
        self.weight, self.temperature = weight, temperature
        self.label_smoothing = label_smoothing

    def train(self) -> None:
        self.student.train()

    def loss(self, images: Tensor, labels: Tensor, given: Given | None) -> Loss:
        if given is None or given.logits is None:
            raise ValueError("the distillation of logits needs the teacher's logits in training")
        logits = self.student(images)
        task = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        target = (given.logits.float() / self.temperature).softmax(dim=1)
        loss = F.cross_entropy(logits.float() / self.temperature, target) * self.temperature**2
        return Loss(total=task + self.weight * loss, task=task, transfer=loss, transfer_name="logit_loss")

    def logits(self, student: nn.Module, images: Tensor, given: Given | None) -> Tensor:
        return student(images)
