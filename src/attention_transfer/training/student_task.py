"""What the training of a student minimises: the loss of its method on views of the labelled images."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer.training.batches import Images, order, paired
from attention_transfer.training.division import UNDIVIDED, WHOLE, Division, Pass
from attention_transfer.training.prefetch import Prefetch
from attention_transfer.transfer.method import Given, Method
from attention_transfer.transfer.teacher_source import CachedTeacher, TeacherSource


class _Batch(NamedTuple):
    """What a pass reads; `given` where the teacher's attention is cached."""

    rows: np.ndarray
    images: Tensor
    targets: Tensor
    given: Given | None


class StudentTask:
    """Trains a student on labelled images, one view of each an epoch.

    While a pass is worked on, a thread renders the next one's views and reads their attention from the cache. It
    ends with the `with` block. Images that other processes decode are begun one pass earlier still, so that these
    are never without work.

    Args:
        images: the labelled ones.
        views: number K of views; epoch e shows view e mod K.
        teacher: where what the method needs of the teacher comes from; None if it needs nothing.
        accuracy: top-1 accuracy of a model on the validation images.
        bfloat16: whether matrix products run in that format.
        division: the passes that will be asked for.
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
        division: Division = UNDIVIDED,
    ) -> None:
        self.method = method
        self.model = method.student
        self.images, self.views, self.teacher = images, views, teacher
        self.accuracy = accuracy
        self.batch_size, self.seed, self.device, self.bfloat16 = batch_size, seed, device, bfloat16
        self.steps_per_epoch = len(images) // batch_size
        self.division = division
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._batches: Prefetch[Pass, _Batch] = Prefetch(self._read)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.close()

    def train(self) -> None:
        self.method.train()

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """The rows of one batch."""
        known = self._epoch  # of whichever thread asked last
        if known[0] != epoch:
            rows = order(len(self.images), seed=self.seed, epoch=epoch)
            partners = self.images.partners(epoch % self.views)
            known = self._epoch = (epoch, rows if partners is None else paired(rows, partners))
        return known[1][step * self.batch_size : (step + 1) * self.batch_size]

    def losses(self, epoch: int, step: int, part: slice = WHOLE) -> dict[str, Tensor]:
        request = Pass(epoch, step, part)
        batch = self._batches.take(request)
        self._batches.ask(self._next(request))
        with self._autocast():
            given = batch.given
            if given is None:
                given = self._taught(batch.images, batch.rows, epoch)
            loss = self.method.loss(batch.images, batch.targets, given)
        losses = {"total": loss.total, "task_loss": loss.task}
        return losses if loss.transfer is None else {**losses, loss.transfer_name: loss.transfer}

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"validation_accuracy": self.accuracy(model)}

    def _next(self, request: Pass) -> Pass:
        return request.following(self.division, steps_per_epoch=self.steps_per_epoch)

    def _shown(self, request: Pass) -> tuple[np.ndarray, int]:
        """Rows and view number."""
        return self.rows(request.epoch, request.step)[request.part], request.epoch % self.views

    def _read(self, request: Pass) -> _Batch:
        epoch, (rows, view) = request.epoch, self._shown(request)
        self.images.begin(*self._shown(self._next(request)))
        images, targets = self.images.render(rows, view), self.images.targets(rows, view)
        with self._autocast():
            given = self._taught(images, rows, epoch) if isinstance(self.teacher, CachedTeacher) else None
        return _Batch(rows, images, targets, given)

    def _taught(self, images: Tensor, rows: np.ndarray, epoch: int) -> Given | None:
        return self.teacher(images, self.images.examples[rows], epoch % self.views) if self.teacher else None

    def _autocast(self) -> torch.autocast:
        # The teacher runs in the same format as when its attention is cached.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
