"""The one training loop: for teachers and students, on whatever device, resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from attention_transfer import stop_signals
from attention_transfer.errors import StudyError
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.optimisation import Recipe, optimiser, schedule

SECONDS_BETWEEN_CHECKPOINTS = 20.0


class Task(Protocol):
    """What is trained. Every random choice is a function of (epoch, step), so that a resumed run repeats it."""

    model: nn.Module
    steps_per_epoch: int

    def train(self) -> None:
        """Puts the model into training mode."""

    def losses(self, epoch: int, step: int) -> dict[str, Tensor]:
        """Losses of one batch by name; `total` is minimised and the others are recorded.

        Args:
            epoch: from 0.
            step: within the epoch, from 0.
        """

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a model, the trained one or its average, by name."""


class MetricSink(Protocol):
    """Where curves are shown while they grow."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...


@dataclass
class History:
    """What the loop has to tell: one row an epoch."""

    rows: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0


def fit(
    task: Task,
    recipe: Recipe,
    *,
    seed: int,
    clip_norm: float | None,
    validate_every: int,
    checkpoint: Checkpoint,
    sink: MetricSink,
    label: str,
    where: str,
) -> tuple[nn.Module, History]:
    """Trains to the end of the schedule.

    Args:
        seed: of everything random inside the model, such as stochastic depth.
        validate_every: epochs; the last one is always validated.
        label: shown beside the progress bar.
        where: file and key of the recipe, for error messages.

    Returns:
        The model that counts (the average of the weights where the recipe asks for one), in eval mode,
        and the history.

    Raises:
        StudyError: the loss is no longer a number, or a batch is larger than the data set.
        SystemExit: SIGTERM or SIGINT came; the state of that moment is saved.
    """
    if task.steps_per_epoch < 1:
        raise StudyError(
            f"a batch of {label} is larger than its data set", where=where, remedy="lower batch_size"
        )
    optimizer = optimiser(task.model, recipe)
    scheduler = schedule(optimizer, recipe, task.steps_per_epoch)
    average = ModelEmaV3(task.model, decay=recipe.ema) if recipe.ema else None
    history = History()
    sums: dict[str, Tensor] = {}
    if (state := checkpoint.load()) is not None:
        task.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.module.load_state_dict(state["average"])
        history = History(state["rows"], state["steps"])
        sums = {name: value.to(_device(task.model)) for name, value in state["sums"].items()}

    def save() -> None:
        checkpoint.save(
            {
                "model": task.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": None if average is None else average.module.state_dict(),
                "rows": history.rows,
                "steps": history.steps,
                "sums": sums,
            }
        )

    total = recipe.epochs * task.steps_per_epoch
    saved = time.monotonic()
    with stop_signals.awaited() as stopped, _progress(total, history.steps, label) as progress:
        while history.steps < total:
            epoch, step = divmod(history.steps, task.steps_per_epoch)
            scheduler.step_update(history.steps)
            task.train()
            torch.manual_seed(_step_seed(seed, history.steps))
            losses = task.losses(epoch, step)
            optimizer.zero_grad(set_to_none=True)
            losses["total"].backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(task.model.parameters(), clip_norm)
            optimizer.step()
            if average is not None:
                average.update(task.model, step=history.steps)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
            history.steps += 1
            if step + 1 == task.steps_per_epoch:
                row = _row(history.steps, epoch, sums, task.steps_per_epoch, optimizer)
                _refuse_nan(row, label=label, where=where, rate=recipe.learning_rate)
                if (epoch + 1) % validate_every == 0 or epoch + 1 == recipe.epochs:
                    row |= task.validate(task.model if average is None else average.module)
                history.rows.append(row)
                sums = {}
                sink.log_metrics({k: v for k, v in row.items() if k not in ("epoch", "step")}, step=epoch + 1)
                progress.set_postfix_str(
                    " ".join(f"{k}={v:.3g}" for k, v in row.items() if "loss" in k or "acc" in k),
                    refresh=False,  # a bar that is shown before its delay is never closed
                )
            progress.update()
            if stopped() or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                save()
                saved = time.monotonic()
            if number := stopped():
                raise SystemExit(128 + number)
    return (task.model if average is None else average.module).eval(), history


def _row(steps: int, epoch: int, sums: dict[str, Tensor], count: int, optimizer: Any) -> dict[str, float]:
    means = {name: float(value) / count for name, value in sums.items()}
    rate = max(group["lr"] for group in optimizer.param_groups)
    return {"epoch": epoch + 1, "step": steps, **means, "learning_rate": rate}


def _refuse_nan(row: dict[str, float], *, label: str, where: str, rate: float) -> None:
    if not all(math.isfinite(value) for value in row.values()):
        raise StudyError(
            f"the loss of {label} became {row['total']} in epoch {int(row['epoch'])}",
            where=where,
            remedy=f"lower learning_rate (now {rate:g}), lengthen warmup_epochs, or set training.clip_norm",
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _progress(total: int, done: int, label: str) -> tqdm[Any]:
    # A line every 10 s when the output is a log file, a living bar in a terminal.
    return tqdm(total=total, initial=done, desc=label, unit="step", mininterval=1.0, maxinterval=10, delay=2)
