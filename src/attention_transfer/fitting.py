"""Trains one student of a run: what the stages `train` and `finetuned` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer import machine_file
from attention_transfer.assembly import Parts
from attention_transfer.data import views
from attention_transfer.evaluation.predictions import predict_all
from attention_transfer.models import students
from attention_transfer.teaching import teacher_source
from attention_transfer.training import execution
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.loop import History, MetricSink, fit
from attention_transfer.training.student_task import StudentTask
from attention_transfer.transfer import methods
from attention_transfer.transfer.method import Method

Score = Callable[[nn.Module, int], tuple[float, float]]
"""From a model to its accuracy and mean cross-entropy on the first so many validation images."""


def fit_student(
    parts: Parts, name: str, seed: int, *, checkpoints: Path, sink: MetricSink, label: str, where: str
) -> tuple[nn.Module, History, Score]:
    """Trains a student to the end of its run's schedule.

    Args:
        name: of the run.
        checkpoints: folder of this very computation.
        label: shown beside the progress bar.
        where: file and key of the run, for error messages.

    Returns:
        The trained student, its history, and what scores it on the validation images.
    """
    study = parts.study
    run = study.runs[name]
    initial = run.teacher if run.method in ("finetune", "linear_probe") else run.initial
    student = students.create(
        parts.student_arguments(name),
        seed=seed,
        drop_path=run.drop_path,
        teacher=None if initial is None else parts.teacher(initial).cpu(),
        copied_layers=methods.slimmed_layers(study, name),
    ).to(parts.device)
    how = execution_of(parts, name, where=where)
    how.apply(student)
    method = methods.build(study, name, student)
    score = validation(parts, name, method)
    with StudentTask(
        method,
        images=parts.labelled,
        views=study.views.per_image,
        teacher=teacher_source(parts, name, "views", method.needs),
        accuracy=lambda model: score(model, study.training.curve_images)[0],
        batch_size=run.batch_size,
        seed=seed,
        device=parts.device,
        bfloat16=parts.bfloat16,
        division=how.division,
    ) as task:
        model, history = fit(
            task,
            run,
            seed=seed,
            clip_norm=study.training.clip_norm,
            validate_every=study.training.validate_every,
            checkpoint=Checkpoint(checkpoints),
            sink=sink,
            label=label,
            where=where,
            division=how.division,
            sharded=how.sharded,
        )
    return model, history, score


def execution_of(parts: Parts, name: str, *, where: str) -> execution.Execution:
    """How a run's student is trained on this machine.

    Args:
        where: file and key of the run, for error messages.
    """
    run = parts.study.runs[name]
    return execution.choose(
        machine_file.settings(),
        batch=run.batch_size,
        pairs=parts.study.views.mixes,
        called="in parts" if run.method in ("linear_probe", "distill_features") else "whole",
        shardable=True,
        where=where,
    )


def validation(parts: Parts, name: str, method: Method) -> Score:
    """What scores a run's student on the validation images."""
    images, examples = parts.evaluated("validation")
    clean, labels = parts.clean(images.images), torch.from_numpy(images.labels)
    needs = method.needs if method.teacher_at_inference else None
    teacher = teacher_source(parts, name, "validation", needs)

    def score(model: nn.Module, count: int) -> tuple[float, float]:
        model.eval()

        def predict(rows: np.ndarray) -> Tensor:
            batch = clean(rows)
            with torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.bfloat16):
                given = teacher(batch, examples[rows], views.CLEAN) if teacher else None
                return method.logits(model, batch, given)

        logits, expected = predict_all(predict, count, clean.begin).double(), labels[:count]
        accuracy = float((logits.argmax(dim=1) == expected).double().mean())
        return accuracy, float(nn.functional.cross_entropy(logits, expected))

    return score


def save_student(parts: Parts, name: str, model: Any, folder: Path) -> None:
    """Writes a run's trained student as a timm model."""
    students.save(folder, model, parts.student_arguments(name), methods.slimmed_layers(parts.study, name))
