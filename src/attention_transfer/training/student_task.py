"""What the training of a student minimises: the loss of its method on views of the labelled images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer.training.batches import Images, order, paired
from attention_transfer.transfer.method import Method
from attention_transfer.transfer.teacher_source import TeacherSource


class StudentTask:
    """Trains a student on labelled images, one view of each an epoch.

    Args:
        images: the labelled ones.
        views: number K of views; epoch e shows view e mod K.
        teacher: where what the method needs of the teacher comes from; None if it needs nothing.
        accuracy: top-1 accuracy of a model on the validation images.
        bfloat16: whether matrix products run in that format.
    """

    def __init__(
        self,
        method: Method,
        *,
        images: Images,
        views: int,
        teacher: TeacherSource | None,
        accuracy: Callable[[nn.Module], float],
        batch_size: int,
        seed: int,
        device: torch.device,
        bfloat16: bool,
    ) -> None:
        self.method = method
        self.model = method.student
        self.images, self.views, self.teacher = images, views, teacher
        self.accuracy = accuracy
        self.batch_size, self.seed, self.device, self.bfloat16 = batch_size, seed, device, bfloat16
        self.steps_per_epoch = len(images) // batch_size
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def train(self) -> None:
        self.method.train()

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """The rows of one batch."""
        if self._epoch[0] != epoch:
            rows = order(len(self.images), seed=self.seed, epoch=epoch)
            partners = self.images.partners(epoch % self.views)
            self._epoch = (epoch, rows if partners is None else paired(rows, partners))
        return self._epoch[1][step * self.batch_size : (step + 1) * self.batch_size]

    def losses(self, epoch: int, step: int) -> dict[str, Tensor]:
        rows, view = self.rows(epoch, step), epoch % self.views
        images, targets = self.images.render(rows, view), self.images.targets(rows, view)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            # The teacher runs in the same format as when its attention is cached.
            given = self.teacher(images, self.images.examples[rows], view) if self.teacher else None
            loss = self.method.loss(images, targets, given)
        losses = {"total": loss.total, "task_loss": loss.task}
        return losses if loss.transfer is None else {**losses, loss.transfer_name: loss.transfer}

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"validation_accuracy": self.accuracy(model)}
