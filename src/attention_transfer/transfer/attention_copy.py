"""Attention Copy: the student's maps are the teacher's, in training and at inference (paper A, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer.models.attention import Attention, hand_over
from attention_transfer.transfer.method import Loss


class AttentionCopy:
    """out = P_teacher v_student, in the given layers.

    Args:
        student: slimmed in these layers, see `models.attention.slim`.
        layers: same layer to same layer, same head to same head.
    """

    teacher_at_inference = True

    def __init__(self, student: nn.Module, *, layers: tuple[int, ...], label_smoothing: float) -> None:
        self.student = student
        self.layers = layers
        self.label_smoothing = label_smoothing

    def train(self) -> None:
        self.student.train()

    def loss(self, images: Tensor, labels: Tensor, attention: Tensor | None) -> Loss:
        logits = self.logits(self.student, images, attention)
        task = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return Loss(total=task, task=task)

    def logits(self, student: nn.Module, images: Tensor, attention: Tensor | None) -> Tensor:
        if attention is None:
            raise ValueError("Attention Copy needs the teacher's attention at every pass")
        queries, keys = attention.unbind(dim=1)
        given = {
            layer: Attention(queries[:, index], keys[:, index]) for index, layer in enumerate(self.layers)
        }
        with hand_over(student, given):
            return student(images)
