"""What the loop trains: a student by its method, a masked autoencoder."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer.transfer.attention_source import AttentionSource
from attention_transfer.transfer.method import Method

Render = Callable[[np.ndarray, int], Tensor]
"""Rows of the training images and a view number to normalised images (batch, channels, size, size)."""


@functools.lru_cache(maxsize=2)
def order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's examples: a function of seed and epoch alone, the same for every method."""
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(count)


class StudentTask:
    """Trains a student on labelled images, one view of each an epoch.

    Args:
        labels: int64 (examples,) of the labelled images.
        examples: their numbers in the training split.
        render: see `Render`.
        views: number K of views; epoch e shows view e mod K.
        attention: where the teacher's attention comes from; None for a method without transfer.
        accuracy: top-1 accuracy of a model on the validation images.
        bfloat16: whether matrix products run in that format.
    """

    def __init__(
        self,
        method: Method,
        *,
        labels: np.ndarray,
        examples: np.ndarray,
        render: Render,
        views: int,
        attention: AttentionSource | None,
        accuracy: Callable[[nn.Module], float],
        batch_size: int,
        seed: int,
        device: torch.device,
        bfloat16: bool,
    ) -> None:
        self.method = method
        self.model = method.student
        self.labels, self.examples = torch.from_numpy(labels).to(device), examples
        self.render, self.views, self.attention = render, views, attention
        self.accuracy = accuracy
        self.batch_size, self.seed, self.device, self.bfloat16 = batch_size, seed, device, bfloat16
        self.steps_per_epoch = len(labels) // batch_size

    def train(self) -> None:
        self.method.train()

    def losses(self, epoch: int, step: int) -> dict[str, Tensor]:
        rows = order(len(self.examples), seed=self.seed, epoch=epoch)
        rows = rows[step * self.batch_size : (step + 1) * self.batch_size]
        view = epoch % self.views
        images = self.render(rows, view).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            # The teacher runs in the same format as when its attention is cached.
            attention = None
            if self.attention is not None:
                attention = self.attention(images, self.examples[rows], view)
            loss = self.method.loss(images, self.labels[torch.from_numpy(rows)], attention)
        losses = {"total": loss.total, "task_loss": loss.task}
        return losses if loss.attention is None else {**losses, "attention_loss": loss.attention}

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"validation_accuracy": self.accuracy(model)}


class PretrainingTask:
    """Trains a masked autoencoder on images without labels, a fresh view of each an epoch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        count: int,
        render: Render,
        batch_size: int,
        seed: int,
        device: torch.device,
        bfloat16: bool,
    ) -> None:
        self.model = model
        self.count, self.render = count, render
        self.batch_size, self.seed, self.device, self.bfloat16 = batch_size, seed, device, bfloat16
        self.steps_per_epoch = count // batch_size

    def train(self) -> None:
        self.model.train()

    def losses(self, epoch: int, step: int) -> dict[str, Tensor]:
        rows = order(self.count, seed=self.seed, epoch=epoch)
        rows = rows[step * self.batch_size : (step + 1) * self.batch_size]
        images = self.render(rows, epoch).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.model(images)
        return {"total": loss}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Nothing: without labels the loss itself is all there is to watch."""
        return {}
