"""Trainings, predictions and caches of the tiny study, as one process or several compute them.

    python working_together.py FOLDER

Process 0 writes to FOLDER/outcomes.pt what all the checks gave. Tests call the same functions in one process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_study
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from attention_transfer import processes
from attention_transfer.assembly import Parts
from attention_transfer.config_teachers import Teacher
from attention_transfer.data.labelled import LabelledViews
from attention_transfer.evaluation.predictions import BATCH, predict_all
from attention_transfer.machine_file import Machine
from attention_transfer.models import pretraining, students
from attention_transfer.teaching import teacher_source
from attention_transfer.training import execution, sharding
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.loop import fit
from attention_transfer.training.passes import Passes
from attention_transfer.training.pretraining_task import PretrainingTask
from attention_transfer.training.student_task import StudentTask
from attention_transfer.transfer import methods

STEPS = ((0, 0), (1, 2))
"""Epoch and step of the batches whose gradients are compared: of two views."""


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        method: of a run; or the kind of a pre-training.
        changes: of the tiny study, by dotted key; or of the teacher's params.
        machine: how the process works.
    """

    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    dtype: torch.dtype = torch.float64


class Exact(LabelledViews):
    """The labelled images in float64, so that rounding hides nothing."""

    def render(self, rows: np.ndarray, view: int) -> Tensor:
        return super().render(rows, view).double()

    def targets(self, rows: np.ndarray, view: int) -> Tensor:
        targets = super().targets(rows, view)
        return targets.double() if targets.is_floating_point() else targets


@dataclass(frozen=True)
class Alternating:
    """Two views of the labelled images, in turns."""

    images: LabelledViews
    dtype: torch.dtype

    def __call__(self, rows: np.ndarray, view: int) -> Tensor:
        return self.images.render(rows, view % 2).to(self.dtype)

    def begin(self, rows: np.ndarray, view: int) -> None:
        self.images.begin(rows, view % 2)


def task(case: Case) -> tuple[Any, execution.Execution]:
    """The case's task, and how it is executed here."""
    if case.method in PRETRAINING:
        return pretraining_task(case)
    study = tiny_study.make_study(case.method, case.changes)
    parts = tiny_study.make_parts(study)
    run = study.runs["run"]
    student = students.create(
        parts.student_arguments("run"),
        seed=0,
        drop_path=run.drop_path,
        teacher=parts.teacher("first") if case.method in ("finetune", "linear_probe") else None,
        copied_layers=methods.slimmed_layers(study, "run"),
    ).to(case.dtype)
    how = execution.choose(
        case.machine, batch=run.batch_size, pairs=study.views.mixes,
        called="in parts" if case.method in ("linear_probe", "distill_features") else "whole",
        shardable=True, where="",
    )  # fmt: skip
    how.apply(student)
    method = methods.build(study, "run", student)
    source: Any = teacher_source(parts, "run", "views", method.needs)
    if source is not None:
        source.teacher.to(case.dtype)
    exact = case.dtype == torch.float64
    return StudentTask(
        method,
        images=Exact(**vars(parts.labelled)) if exact else parts.labelled,
        views=2,
        teacher=source,
        accuracy=lambda model: accuracy(parts, method, model.to(case.dtype), source, exact),
        batch_size=run.batch_size,
        seed=0,
        device=tiny_study.CPU,
        bfloat16=parts.bfloat16,
        division=how.division,
    ), how


def accuracy(parts: Parts, method: Any, model: nn.Module, source: Any, exact: bool) -> float:
    """Of a model on the validation images, shared out among the processes."""
    images, examples = parts.evaluated("validation")
    clean = parts.clean(images.images)
    model.eval()

    def predict(rows: np.ndarray) -> Tensor:
        batch = clean(rows).double() if exact else clean(rows)
        given = source(batch, examples[rows], -1) if method.teacher_at_inference else None
        return method.logits(model, batch, given)

    logits = predict_all(predict, len(images), clean.begin)
    return float((logits.argmax(dim=1).numpy() == images.labels).mean())


PRETRAINING: dict[str, dict[str, Any]] = {
    "mae": {"decoder": {"width": 8, "depth": 1, "heads": 2}, "mask_ratio": 0.5},
    "simmim": {"mask_ratio": 0.5},
    "supervised": {"groups": (0, 1, 1), "label_smoothing": 0.1},
}


def pretraining_task(case: Case) -> tuple[Any, execution.Execution]:
    parts = tiny_study.make_parts(tiny_study.make_study("scratch"))
    params: Any = TypeAdapter(Teacher).validate_python(
        {
            "kind": case.method, "architecture": tiny_study.ARCHITECTURE, "epochs": 2, "warmup_epochs": 1.0,
            "batch_size": 7, "learning_rate": 0.01, "weight_decay": 0.05, "crop_scale": (0.5, 1.0), "seed": 0,
            **PRETRAINING[case.method], **case.changes,
        }
    )  # fmt: skip
    model: Any = pretraining.build(params, parts.teacher_arguments("first"), steps=6).to(case.dtype)
    how = execution.choose(case.machine, batch=params.batch_size, pairs=False, called="in parts", where="")
    how.apply(model.encoder)
    labelled = parts.labelled
    return PretrainingTask(
        model,
        count=len(labelled),
        views=1,
        labels=labelled.labels if model.labelled else None,
        render=Alternating(labelled, case.dtype),
        batch_size=params.batch_size,
        seed=0,
        device=tiny_study.CPU,
        bfloat16=False,
        division=how.division,
    ), how


def gradients(case: Case) -> dict[str, Tensor]:
    """Gradients and losses of two steps from the first weights; the second after an update."""
    made, how = task(case)
    passes = Passes(made, how.division, sharded=how.sharded)
    found = {}
    for number, (epoch, step) in enumerate(STEPS):
        made.train()
        made.model.zero_grad()
        losses = passes.backward(epoch, step, seed=7 + number)
        found |= {f"{number} {name}": value.double() for name, value in losses.items()}
        for name, weight in made.model.named_parameters():
            if weight.grad is not None:
                found[f"{number} {name}"] = sharding.whole(weight.grad).double().clone()
                with torch.no_grad():
                    weight.sub_(0.1 * weight.grad)
    close(made)
    return found


def weights(case: Case, checkpoint: Checkpoint | None = None) -> dict[str, Tensor]:
    """Weights after training, the average of them where the case asks for one, and the curve.

    Args:
        checkpoint: if there is one, a stop signal comes on the way, and the training goes on from it.
    """
    if checkpoint is not None:
        try:
            _trained(case, checkpoint, stopped_at=(1, 1))
        except SystemExit:
            processes.collected(None)  # until it is written
    return _trained(case, checkpoint or Unsaved(Path("none")))


class Unsaved(Checkpoint):
    """Of a training that is not interrupted, however slow the machine."""

    def save(self, state: dict[str, Any]) -> None: ...


def _trained(
    case: Case, checkpoint: Checkpoint, *, stopped_at: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    made, how = task(case)
    losses = made.losses

    def stopping(epoch: int, step: int, *part: slice) -> dict[str, Tensor]:
        if (epoch, step) == stopped_at and processes.number() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(epoch, step, *part)

    made.losses = stopping
    study = tiny_study.make_study(case.method, case.changes)
    try:
        model, history = fit(
            made, study.runs["run"], seed=0, clip_norm=1.0, validate_every=1, checkpoint=checkpoint,
            sink=Silent(), label="x", where="x", division=how.division, sharded=how.sharded,
        )  # fmt: skip
    finally:
        close(made)
    curve = {
        f"{key} of epoch {row['epoch']}": torch.tensor(value, dtype=torch.float64)
        for row in history.rows
        for key, value in row.items()
    }
    return curve | {name: value.double() for name, value in model.state_dict().items()}


def close(made: Any) -> None:
    if isinstance(made, StudentTask):
        made.__exit__(None, None, None)


class Silent:
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...


def predicted(count: int) -> tuple[Tensor, list[int]]:
    """Logits that name their row, and the rows that this process was asked for."""
    asked: list[int] = []

    def predict(rows: np.ndarray) -> Tensor:
        asked.extend(rows.tolist())
        return torch.from_numpy(np.stack([rows, rows % BATCH], axis=1)).float()

    return predict_all(predict, count, lambda rows: None), asked


MIXED = {"views.mixup": 0.8, "views.cutmix": 1.0}
UNEVEN = {"runs.run.batch_size": 7}
DEEP = {"runs.run.drop_path": 0.3}
METHODS = ("scratch", "finetune", "linear_probe", "copy", "distill", "distill_features", "distill_logits")
CASES: dict[str, Case] = {
    **{method: Case(method) for method in METHODS},
    **{f"{method}, uneven": Case(method, UNEVEN) for method in METHODS},
    **{f"{method}, mixed": Case(method, MIXED) for method in ("scratch", "copy", "distill")},
    **{f"{method}, stochastic depth": Case(method, DEEP) for method in ("scratch", "distill")},
    "copy of queries": Case("copy", {"runs.run.transfer": "query"}),
    "distill some heads": Case("distill", {"runs.run.heads": (1,)}),
    "distill values": Case("distill", {"runs.run.transfer": "value"}),
    "distill, mixed pairs uneven": Case("distill", {**MIXED, "runs.run.batch_size": 6}),
    "mae": Case("mae"),
    "simmim": Case("simmim"),
    "supervised": Case("supervised"),
}
PASSES = {"micro_batch": 2}
MANY_PASSES = {
    f"{name}, in passes": replace(CASES[name], machine=Machine(**PASSES))
    for name in ("scratch", "copy", "distill, uneven", "distill, mixed", "distill, stochastic depth", "mae")
}
CHECKPOINTED = {
    f"{name}, checkpointed{how}": replace(CASES[name], machine=Machine(checkpointing=True, **more))
    for how, more in (("", {}), (" in passes", PASSES))
    for name in ("scratch", "copy", "distill", "distill, stochastic depth", "distill_features", "mae")
}
IN_FLOAT32 = {
    f"{name}, float32": replace(CASES[name], dtype=torch.float32)
    for name in ("scratch", "copy", "distill", "distill_features")
}
IN_BFLOAT16 = {
    f"{name}, bfloat16": Case(name, {"training.precision": "bfloat16"}, dtype=torch.float32)
    for name in ("copy", "distill")
}
FSDP = {"sharding": "fsdp"}
SHARDED = {
    f"{name}, sharded{how}": replace(CASES[name], machine=Machine(**FSDP, **more))
    for name, how, more in (
        ("scratch", " in passes", PASSES),
        ("linear_probe", "", {}),
        ("copy", "", {}),
        ("copy", " and checkpointed", {"checkpointing": True}),
        ("distill, uneven", "", {}),
        ("distill, stochastic depth", " and checkpointed", {"checkpointing": True}),
        ("distill some heads", " in passes", PASSES),
        ("distill_features", " and checkpointed", {"checkpointing": True}),
    )
}
TOGETHER = CASES | SHARDED | MANY_PASSES | CHECKPOINTED | IN_FLOAT32 | IN_BFLOAT16
TRAINED = {
    "scratch with an average": Case("scratch", {"runs.run.ema": 0.9}),
    "distill, uneven": Case("distill", UNEVEN),
    "copy, mixed, in passes": Case("copy", MIXED, Machine(micro_batch=2)),
    "linear_probe": Case("linear_probe"),
    "distill with an average, sharded": Case("distill", {"runs.run.ema": 0.9}, Machine(**FSDP)),
    "copy, mixed, in passes, sharded": Case("copy", MIXED, Machine(**FSDP, **PASSES)),
}
RESUMED = ("scratch with an average", "distill with an average, sharded")
COUNTS = (1, BATCH, BATCH + 1, 3 * BATCH - 7, 4 * BATCH)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    processes.join(tiny_study.CPU)
    os.chdir(folder)
    outcomes: dict[str, Any] = {"gradients": {}, "weights": {}, "resumed": {}, "predicted": {}}
    for name, case in TOGETHER.items():
        outcomes["gradients"][name] = gradients(case)
    for name, case in TRAINED.items():
        outcomes["weights"][name] = weights(case)
    for name in RESUMED:
        outcomes["resumed"][name] = weights(TRAINED[name], Checkpoint(folder / "stopped" / name))
    for count in COUNTS:
        logits, asked = predicted(count)
        outcomes["predicted"][count] = logits, processes.collected(asked)
    outcomes["cache"] = write_cache(Path("caches") / "together")
    if processes.number() == 0:
        torch.save(outcomes, folder / "outcomes.pt")
    processes.part()


def write_cache(folder: Path) -> dict[str, Any]:
    """The teacher's attention, in shards of a few rows."""
    from unittest import mock

    from attention_transfer.layout import Layout
    from attention_transfer.transfer import cache_writer

    study = tiny_study.make_study("distill", {"attention.source": "cache"})

    class Elsewhere(Layout):
        def cache(self, teacher: str) -> Path:
            return folder / teacher

    parts = Parts(study, Elsewhere("tiny"), tiny_study.CPU)
    original = cache_writer.CacheWriter.__init__

    def small(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options, shard_bytes=5000)

    with mock.patch.object(cache_writer.CacheWriter, "__init__", small):
        return {
            which: tiny_study.script("cache").write(parts, "first", which)
            for which in ("views", "validation")
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
