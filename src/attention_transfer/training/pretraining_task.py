"""What pre-training trains: a module whose call gives the loss of a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer.training.batches import Render, order
from attention_transfer.training.division import WHOLE


class PretrainingTask:
    """Trains on images in fresh views every epoch.

    Args:
        model: called with `views` views of the same images, and with their labels where there are any.
        labels: int64 (count,); None where the model asks for none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        count: int,
        views: int,
        labels: np.ndarray | None,
        render: Render,
        batch_size: int,
        seed: int,
        device: torch.device,
        bfloat16: bool,
    ) -> None:
        self.model = model
        self.count, self.views, self.labels, self.render = count, views, labels, render
        self.batch_size, self.seed, self.device, self.bfloat16 = batch_size, seed, device, bfloat16
        self.steps_per_epoch = count // batch_size

    def train(self) -> None:
        self.model.train()

    def losses(self, epoch: int, step: int, part: slice = WHOLE) -> dict[str, Tensor]:
        rows = order(self.count, seed=self.seed, epoch=epoch)
        rows = rows[step * self.batch_size : (step + 1) * self.batch_size][part]
        batch = [
            self.render(rows, epoch * self.views + number).to(self.device) for number in range(self.views)
        ]
        if self.labels is not None:
            batch.append(torch.from_numpy(self.labels[rows]).to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.model(*batch)
        return {"total": loss}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Nothing: the loss itself is all there is to watch."""
        return {}
