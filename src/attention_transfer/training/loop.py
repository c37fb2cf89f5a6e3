"""The one training loop: for teachers and students, on whatever device, resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from tqdm import tqdm

from attention_transfer import processes, stop_signals
from attention_transfer.errors import StudyError
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.division import UNDIVIDED, WHOLE, Division
from attention_transfer.training.optimisation import Recipe, schedule
from attention_transfer.training.trained import Trained

SECONDS_BETWEEN_CHECKPOINTS = 20.0


class Task(Protocol):
    """What is trained. Every random choice is a function of (epoch, step), so that a resumed run repeats it."""

    model: nn.Module
    steps_per_epoch: int

    def train(self) -> None:
        """Puts the model into training mode."""

    def losses(self, epoch: int, step: int, part: slice = WHOLE) -> dict[str, Tensor]:
        """Losses of one batch by name, means over its examples; `total` is minimised and the others are recorded.

        Args:
            epoch: from 0.
            step: within the epoch, from 0.
            part: of the batch, where a step takes several passes or processes.
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
    division: Division = UNDIVIDED,
    sharded: bool = False,
) -> tuple[nn.Module, History]:
    """Trains to the end of the schedule.

    Every process of a stage calls this with the same arguments but for `division`, and gets the same; process 0
    alone writes the checkpoint and shows the curve.

    Args:
        seed: of everything random inside the model, such as stochastic depth.
        validate_every: epochs; the last one is always validated.
        label: shown beside the progress bar.
        where: file and key of the recipe, for error messages.
        division: what of each batch this process works on, and in how many passes.
        sharded: whether the weights are spread over the processes; the model must have `blocks`.

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
    trained = Trained(task, recipe, division, sharded=sharded)
    scheduler = schedule(trained.optimizer, recipe, task.steps_per_epoch)
    history = History()
    sums: dict[str, Tensor] = {}
    if (found := checkpoint.load()) is not None:
        trained.load(found)
        history = History(found["rows"], found["steps"])
        sums = {name: value.to(trained.device) for name, value in found["sums"].items()}

    total = recipe.epochs * task.steps_per_epoch
    saved = time.monotonic()
    with stop_signals.awaited() as stopped, _progress(total, history.steps, label) as progress:
        while history.steps < total:
            epoch, step = divmod(history.steps, task.steps_per_epoch)
            scheduler.step_update(history.steps)
            task.train()
            trained.optimizer.zero_grad(set_to_none=True)
            losses = trained.passes.backward(epoch, step, seed=_step_seed(seed, history.steps))
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(task.model.parameters(), clip_norm)
            trained.step(history.steps)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value
            history.steps += 1
            if step + 1 == task.steps_per_epoch:
                row = _row(history.steps, epoch, sums, task.steps_per_epoch, trained.optimizer)
                _refuse_nan(row, label=label, where=where, rate=recipe.learning_rate)
                if (epoch + 1) % validate_every == 0 or epoch + 1 == recipe.epochs:
                    row |= task.validate(trained.result())
                    trained.put_away()
                history.rows.append(row)
                sums = {}
                _show(row, sink, progress)
            progress.update()
            # Of one mind: a process that stopped alone would leave the others waiting for its gradients.
            due = time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
            number, due_somewhere = processes.largest(stopped(), due)
            if number or due_somewhere:
                state = {**trained.state(), "rows": history.rows, "steps": history.steps, "sums": sums}
                if processes.number() == 0:
                    checkpoint.save(state)
                saved = time.monotonic()
            if number:
                raise SystemExit(128 + number)
    return trained.result().eval(), history


def _row(steps: int, epoch: int, sums: dict[str, Tensor], count: int, optimizer: Any) -> dict[str, float]:
    means = {name: float(value) / count for name, value in sums.items()}
    rate = max(group["lr"] for group in optimizer.param_groups)
    return {"epoch": epoch + 1, "step": steps, **means, "learning_rate": rate}


def _show(row: dict[str, float], sink: MetricSink, progress: tqdm[Any]) -> None:
    if processes.number() == 0:
        shown = {key: value for key, value in row.items() if key not in ("epoch", "step")}
        sink.log_metrics(shown, step=int(row["epoch"]))
    progress.set_postfix_str(
        " ".join(f"{key}={value:.3g}" for key, value in row.items() if "loss" in key or "acc" in key),
        refresh=False,  # a bar that is shown before its delay is never closed
    )


def _refuse_nan(row: dict[str, float], *, label: str, where: str, rate: float) -> None:
    if not all(math.isfinite(value) for value in row.values()):
        raise StudyError(
            f"the loss of {label} became {row['total']} in epoch {int(row['epoch'])}",
            where=where,
            remedy=f"lower learning_rate (now {rate:g}), lengthen warmup_epochs, or set training.clip_norm",
        )


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _progress(total: int, done: int, label: str) -> tqdm[Any]:
    # A line every 10 s when the output is a log file, a living bar in a terminal.
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit="step",
        mininterval=1.0,
        maxinterval=10,
        delay=2,
        disable=processes.number() > 0,
    )
