"""What a training changes: the model's weights, their average, and the optimiser's state; of one process or spread."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from timm.utils import ModelEmaV3
from torch import nn

from attention_transfer.training import sharding
from attention_transfer.training.division import Division
from attention_transfer.training.optimisation import Recipe, optimiser
from attention_transfer.training.passes import Passes

if TYPE_CHECKING:
    from attention_transfer.training.loop import Task


class Trained:
    """A task's model in training.

    Args:
        division: what of each batch this process works on, and in how many passes.
        sharded: whether the weights are spread over the processes; the model must have `blocks`.

    Attributes:
        passes: give the gradients of a batch.
        optimizer: of the parameters that require them.
    """

    def __init__(self, task: Task, recipe: Recipe, division: Division, *, sharded: bool) -> None:
        self.model, self.sharded = task.model, sharded
        self.device = next(self.model.parameters()).device
        # Copies come before the weights are spread, which no copy survives.
        self.average = ModelEmaV3(self.model, decay=recipe.ema) if recipe.ema else None
        self._whole = copy.deepcopy(self.model).cpu() if sharded else None
        self.passes = Passes(task, division, sharded=sharded)
        if sharded and self.average is not None:
            sharding.shard(self.average.module, self.average.module.blocks, self.device)
        self.optimizer = optimiser(self.model, recipe)

    def step(self, number: int) -> None:
        """Changes the weights by their gradients, and the average by the weights."""
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, step=number)

    def result(self) -> nn.Module:
        """The model that counts, with whole weights: of spread ones a copy, until `put_away`; all processes call it."""
        counts = self.model if self.average is None else self.average.module
        if self._whole is None:
            return counts
        self._whole.load_state_dict(sharding.whole(counts.state_dict()))
        return self._whole.to(self.device)

    def put_away(self) -> None:
        """Takes the copy off the device, where it has the size of all that is spread."""
        if self._whole is not None:
            self._whole.cpu()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, which any number of processes can load; all processes call it."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
        }
        return sharding.whole(state) if self.sharded else state

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        pairs = [(self.model, "model")]
        if self.average is not None:
            pairs.append((self.average.module, "average"))
        for module, name in pairs:
            module.load_state_dict(sharding.spread(state[name], module) if self.sharded else state[name])
        moments = state["optimizer"]
        self.optimizer.load_state_dict(
            sharding.spread_optimiser(moments, self.optimizer) if self.sharded else moments
        )
