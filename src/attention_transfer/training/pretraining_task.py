"""What pre-training trains: a module whose call gives the loss of a batch."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer.training.batches import Render, order
from attention_transfer.training.division import UNDIVIDED, WHOLE, Division, Pass
from attention_transfer.training.prefetch import Prefetch


class PretrainingTask:
    """Trains on images in fresh views every epoch.

    While a pass is worked on, a thread renders the next one's views. It ends with the `with` block.

    Args:
        model: called with `views` views of the same images, and with their labels where there are any.
        labels: int64 (count,); None where the model asks for none.
        division: the passes that will be asked for.
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
        division: Division = UNDIVIDED,
    ) -> None:
        self.model = model
        self.count, self.views, self.labels, self.render = count, views, labels, render
        self.batch_size, self.seed, self.device, self.bfloat16 = batch_size, seed, device, bfloat16
        self.steps_per_epoch = count // batch_size
        self.division = division
        self._batches: Prefetch[Pass, list[Tensor]] = Prefetch(self._read)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.close()

    def train(self) -> None:
        self.model.train()

    def losses(self, epoch: int, step: int, part: slice = WHOLE) -> dict[str, Tensor]:
        request = Pass(epoch, step, part)
        batch = self._batches.take(request)
        self._batches.ask(request.following(self.division, steps_per_epoch=self.steps_per_epoch))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.model(*batch)
        return {"total": loss}

    def _rows(self, request: Pass) -> np.ndarray:
        rows = order(self.count, seed=self.seed, epoch=request.epoch)
        return rows[request.step * self.batch_size : (request.step + 1) * self.batch_size][request.part]

    def _read(self, request: Pass) -> list[Tensor]:
        rows, first = self._rows(request), request.epoch * self.views
        following = request.following(self.division, steps_per_epoch=self.steps_per_epoch)
        batch = []
        for view in range(first, first + self.views):
            # Each is begun while the one before is waited for.
            if view + 1 < first + self.views:
                self.render.begin(rows, view + 1)
            else:
                self.render.begin(self._rows(following), following.epoch * self.views)
            batch.append(self.render(rows, view).to(self.device))
        if self.labels is not None:
            batch.append(torch.from_numpy(self.labels[rows]).to(self.device))
        return batch

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Nothing: the loss itself is all there is to watch."""
        return {}
