"""The forward and backward passes of a step: one, or several, on one process or many, to the same gradients."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attention_transfer import draws, processes
from attention_transfer.training import sharding
from attention_transfer.training.division import Division

if TYPE_CHECKING:
    from attention_transfer.training.loop import Task


class Passes:
    """Works out the losses of a batch and their gradients, as if it were one pass of one process.

    Losses are means over examples, so each pass counts by its share of the batch; DistributedDataParallel takes the
    mean over the processes, so that each counts as often as there are processes. So does fully_shard.

    Args:
        task: of which `model` alone is trained: its gradients are shared, and a teacher elsewhere is left alone.
        sharded: whether the weights of `model` are spread over the processes: from now on.
    """

    def __init__(self, task: Task, division: Division, *, sharded: bool = False) -> None:
        self.division = division
        self.module: nn.Module = _Losses(task)
        if sharded:
            # Not the model: while a pass is under way, other blocks may stand in the place of its own.
            device = next(task.model.parameters()).device
            sharding.shard(self.module, task.model.blocks, device)  # type: ignore[arg-type]
        elif processes.count() > 1:
            warnings.filterwarnings(
                "ignore", "`broadcast_buffers` is deprecated"
            )  # newer PyTorch's word for it
            # Without the search, parameters that a method leaves without a gradient would be waited for, and the
            # first step would sort the sums anew, so that a resumed run would round in another order.
            self.module = DistributedDataParallel(
                self.module, find_unused_parameters=True, broadcast_buffers=False
            )

    def backward(self, epoch: int, step: int, *, seed: int) -> dict[str, Tensor]:
        """Adds the gradients of one batch, and returns its losses: those of all processes.

        Args:
            seed: of everything random inside the model, in this step.
        """
        division = self.division
        if division.is_whole:
            torch.manual_seed(seed)
            losses: dict[str, Tensor] = self.module(epoch, step)
            losses["total"].backward()
            return {name: value.detach() for name, value in losses.items()}
        sums: dict[str, Tensor] = {}
        for part in division.passes:
            torch.manual_seed(seed)
            share = division.share(part)
            with self._unsynchronised(last=part == division.passes[-1]), draws.for_part(division.batch, part):
                losses = self.module(epoch, step, part)
                (losses["total"] * (share * division.processes)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        return processes.summed(sums)

    def _unsynchronised(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients go to the other processes once a step, with its last pass."""
        if synchronise := getattr(self.module, "set_requires_gradient_sync", None):  # sharded
            synchronise(last)
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()


class _Losses(nn.Module):
    """A task's losses as a module, which holds the trained model and nothing else."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.task = task

    def forward(self, *batch: Any) -> dict[str, Tensor]:
        return self.task.losses(*batch)
