"""What pre-training trains: a masked autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_transfer.training.batches import Render, order


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
