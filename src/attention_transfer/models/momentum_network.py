"""The slowly moving copy of a network that MoCo and DINO learn from."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attention_transfer.models.projections import project
from attention_transfer.models.vit import ViT


class MomentumNetwork(nn.Module):
    """Exponential moving average of the parameters of an encoder and its projector; never gets a gradient.

    Its encoder is always in evaluation mode: targets should not differ because of stochastic depth. Its
    projector has the mode of the model around it: batch norm in it normalises by the batch in training, as
    the online projector's does, because running statistics would lag behind weights that move. Buffers are
    no part of the average: the copy's batch norm collects its own.

    Args:
        encoder, projector: the online network; the average starts as its copy.
        base_momentum: share of the average that step 0 would keep, in [0, 1]; rises to 1.
        steps: training steps in all.

    Raises:
        ValueError: base_momentum or steps is out of its range.
    """

    step: Tensor  # training steps begun, int64; a buffer, so that a resumed run goes on with the schedule

    def __init__(self, encoder: ViT, projector: nn.Module, *, base_momentum: float, steps: int) -> None:
        super().__init__()
        if not 0 <= base_momentum <= 1:
            raise ValueError(f"base_momentum: expected a number in [0, 1], got {base_momentum}")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        self.base_momentum, self.steps = base_momentum, steps
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.projector = copy.deepcopy(projector).requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> MomentumNetwork:
        super().train(mode)
        self.encoder.eval()
        return self

    def momentum(self, step: int) -> float:
        """Half a cosine from base_momentum at step 0 to 1 at the last; 1 from then on."""
        remaining = (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2
        return 1 - (1 - self.base_momentum) * remaining

    @torch.no_grad()
    def update(self, encoder: ViT, projector: nn.Module) -> None:
        """Begins a training step: moves towards the online network by the momentum of this step.

        To be called before the forward pass, once a step. Step 0 moves nothing: the two are equal.
        """
        step = int(self.step)
        if step > 0:
            share = 1 - self.momentum(step)
            for own, online in ((self.encoder, encoder), (self.projector, projector)):
                for average, parameter in zip(own.parameters(), online.parameters(), strict=True):
                    average.lerp_(parameter, share)
        self.step += 1

    @torch.no_grad()
    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Projections of each view, without gradient; see `project`."""
        return project(self.encoder, self.projector, views)
