"""Medians of wall-clock times: of a piece of work, and of steps of the one training loop."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.division import WHOLE
from attention_transfer.training.loop import Task, fit

WARM_UP, LEAST = 2, 3
"""Repetitions before the clock counts, and the fewest that it counts."""


def median_seconds(work: Callable[[], object], *, seconds: float, device: torch.device) -> float:
    """Median time of `work`, repeated until so many seconds have passed."""
    times: list[float] = []
    for _ in range(WARM_UP):
        work()
    _synchronise(device)
    while len(times) < LEAST or sum(times) < seconds:
        start = time.perf_counter()
        work()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_seconds(task: Task, recipe: Any, *, clip_norm: float | None, seconds: float) -> float:
    """Median time of a whole training step: images, attention, both passes, optimiser.

    Args:
        recipe: as `fit` takes it, a section of params.yaml.
        seconds: steps are timed until so many have passed.
    """
    timed = _Timed(task, seconds)
    unseen = contextlib.redirect_stderr(io.StringIO())  # the loop's bar, for a schedule without an end
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_EnoughError), unseen:
        fit(
            timed,
            recipe.model_copy(update={"epochs": 10**6}),  # ended by the clock, not by the schedule
            seed=0,
            clip_norm=clip_norm,
            validate_every=10**6,
            checkpoint=Checkpoint(Path(folder)),
            sink=_Nowhere(),
            label="measuring",
            where="plan",
        )
    return statistics.median(after - before for before, after in pairwise(timed.begun[WARM_UP:]))


class _EnoughError(Exception):
    """Ends a training that has been timed for long enough."""


class _Timed:
    """A task that notes when each of its steps begins."""

    def __init__(self, task: Task, seconds: float) -> None:
        self.task, self.seconds = task, seconds
        self.model, self.steps_per_epoch = task.model, task.steps_per_epoch
        self.device = next(task.model.parameters()).device
        self.begun: list[float] = []

    def train(self) -> None:
        self.task.train()

    def losses(self, epoch: int, step: int, part: slice = WHOLE) -> dict[str, Tensor]:
        _synchronise(self.device)
        self.begun.append(time.perf_counter())
        counted = self.begun[WARM_UP:]
        if len(counted) > LEAST and counted[-1] - counted[0] > self.seconds:
            raise _EnoughError
        return self.task.losses(epoch, step, part)

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {}


class _Nowhere:
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Curves of random images are nobody's."""


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
