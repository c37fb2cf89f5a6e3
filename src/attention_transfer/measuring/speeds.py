"""The measurements behind `plan`: cache, training steps, predictions, a process's start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer import plan
from attention_transfer.config import Pretrained, Study
from attention_transfer.evaluation.predictions import BATCH
from attention_transfer.measuring.clock import median_seconds, step_seconds
from attention_transfer.measuring.subject import Subject
from attention_transfer.models import vit
from attention_transfer.transfer.cache import SHARD_BYTES, CacheReader, CacheWriter
from attention_transfer.transfer.method import Needs
from attention_transfer.transfer.teacher_source import (
    CachedTeacher,
    OnlineTeacher,
    TeacherSource,
    aligning,
    averaging,
    is_cached,
    teacher_attention,
    teacher_maps,
)

SECONDS = 0.4
"""Each measurement repeats its work for about so long."""
LONGEST_STEP, LONGEST_WRITING = 0.5, 1.5
"""Seconds that one step, and writing the temporary cache, should take: larger ones are measured smaller."""
STEP_PASSES = 4
"""A training step takes about so many times the teacher's pass over the same images."""
IMPORTS = (
    "import attention_transfer.stage, attention_transfer.assembly, attention_transfer.models.students, "
    "attention_transfer.training.loop, attention_transfer.transfer.methods"
)


@dataclass(frozen=True)
class TeacherSpeed:
    """One teacher, and a cache of its attention.

    Attributes:
        forward: seconds of the bare pass that gives queries and keys, an image.
        write: seconds to render, compute and store a row.
        rows: in the temporary cache.
        first_read, read: bytes a second, with checksums from a file that the page cache has dropped (where
            the system lets it), and again.
        pretraining_step: seconds; None for a teacher that is not trained.
        pretraining_batch: images in the measured step.
    """

    forward: float
    write: float
    rows: int
    first_read: float
    read: float
    pretraining_step: float | None
    pretraining_batch: int | None


@dataclass(frozen=True)
class RunSpeed:
    """One run.

    Attributes:
        batch: images in the measured steps; fewer than the run's where a step would take long.
        step: seconds of a training step without transfer; None with it.
        cached_step, online_step: with attention from the temporary cache, and from the teacher in the step.
        predict: seconds of a pass without gradients, an image; the teacher's attention is given.
    """

    batch: int
    step: float | None
    cached_step: float | None
    online_step: float | None
    predict: float


@dataclass(frozen=True)
class Speeds:
    """All of it.

    Attributes:
        load: average of the machine over the minute before, in processes: what else it had to do.
        start: seconds that a stage's Python takes to start.
    """

    load: float
    start: float
    teachers: dict[str, TeacherSpeed]
    runs: dict[str, RunSpeed]


def measure(study: Study, device: torch.device, folder: Path) -> Speeds:
    """Measures everything that `Speeds` holds.

    Args:
        folder: an empty one for the temporary caches; the caller removes it.
    """
    load = os.getloadavg()[0]
    start = _elapsed(lambda: subprocess.run([sys.executable, "-c", IMPORTS], check=True))
    teachers: dict[str, TeacherSpeed] = {}
    runs: dict[str, RunSpeed] = {}
    for name in study.teachers:
        teachers[name], measured = _measure_teacher(study, name, device, folder / name)
        runs |= measured
    return Speeds(load, start, teachers, {name: runs[name] for name in study.runs})


def _measure_teacher(
    study: Study, name: str, device: torch.device, folder: Path
) -> tuple[TeacherSpeed, dict[str, RunSpeed]]:
    """A teacher, and the runs that name it, which read from its temporary cache."""
    layers = tuple(range(study.teachers[name].architecture.depth))
    few = np.arange(8)
    small = Subject(study, device, len(few))
    model = small.teacher(name)
    pilot = _pass_seconds(small, model, layers, few) / len(few)
    batches = {run.batch_size for run in study.runs.values() if run.teacher == name}
    batches = {_batch(size, pilot * STEP_PASSES) for size in batches}
    layout = plan.teacher_layout(study, name)
    shard = min(layout.rows_per_shard(SHARD_BYTES), int(LONGEST_WRITING / pilot))
    rows = max(shard, len(few), *batches)
    subject = Subject(study, device, rows)
    forward_batch = _batch(BATCH, pilot)
    forward = _pass_seconds(subject, model, layers, np.arange(min(rows, forward_batch)))
    write = _elapsed(lambda: _write(subject, name, model, folder, forward_batch))
    first_read, read = _read_speeds(folder, max(batches, default=len(few)))
    pretraining = study.teachers[name]
    step = batch = None
    if isinstance(pretraining, Pretrained):
        batch = _batch(pretraining.batch_size, 2 * pilot)
        task = Subject(study, device, 2 * batch).pretraining(pretraining, batch_size=batch)
        step = step_seconds(task, pretraining, clip_norm=study.training.clip_norm, seconds=SECONDS)
    speed = TeacherSpeed(
        forward=forward / min(rows, forward_batch),
        write=write / rows,
        rows=rows,
        first_read=first_read,
        read=read,
        pretraining_step=step,
        pretraining_batch=batch,
    )
    return speed, _measure_runs(subject, name, model, folder, pilot)


def _measure_runs(
    subject: Subject, teacher: str, model: nn.Module, folder: Path, pilot: float
) -> dict[str, RunSpeed]:
    """Runs of one teacher; those that differ in learning rates alone are measured once."""
    study = subject.study
    known: dict[str, RunSpeed] = {}
    found: dict[str, RunSpeed] = {}
    for name, run in study.runs.items():
        if run.teacher == teacher:
            rates = {"learning_rate", "min_learning_rate", "weight_decay", "betas", "epochs", "warmup_epochs"}
            alike = str(run.model_dump(exclude=rates))
            if alike not in known:
                known[alike] = _measure_run(subject, name, model, folder, pilot)
            found[name] = known[alike]
    return found


def _measure_run(subject: Subject, name: str, model: nn.Module, folder: Path, pilot: float) -> RunSpeed:
    study = subject.study
    run, method = study.runs[name], subject.method(name)
    batch = _batch(run.batch_size, pilot * STEP_PASSES)
    if study.views.mixes:
        batch = max(2, batch - batch % 2)  # whole pairs
    sources = _sources(subject, name, model, folder, method.needs)
    measured: dict[int, float] = {}  # by source: what is never cached has one for both
    steps: dict[str, float | None] = dict.fromkeys(("step", "cached_step", "online_step"))
    for kind, source in sources.items():
        if id(source) not in measured:
            task = subject.training(subject.method(name), source, batch_size=batch)
            measured[id(source)] = step_seconds(
                task, run, clip_norm=study.training.clip_norm, seconds=SECONDS
            )
        steps[kind] = measured[id(source)]
    predict = _predict_seconds(subject, name, sources.get("online_step"), pilot)
    return RunSpeed(batch=batch, predict=predict, **steps)


def _sources(
    subject: Subject, name: str, model: nn.Module, folder: Path, needs: Needs | None
) -> dict[str, TeacherSource | None]:
    """What a run's steps are measured with; the teacher runs in the step for what is never cached."""
    if needs is None:
        return {"step": None}
    run, attention = subject.study.runs[name], subject.study.attention
    network = model if run.logit_loss is None else subject.tutor(run.logit_loss.teacher)
    tokens = vit.tokens(subject.study, name)
    online = aligning(OnlineTeacher(network, needs, attention.dtype, attention.content), needs, *tokens)
    cached = online
    if is_cached(needs, attention.content):
        cached = aligning(CachedTeacher(CacheReader(folder, expect=None), needs), needs, *tokens)
    rows = np.arange(8)
    batches = [(subject.clean(rows), rows, 0)]
    online_step = averaging(online, run.average, batches)
    # Over examples the mean is taken once, and then neither source is asked.
    same = run.average == "examples"
    return {
        "cached_step": online_step if same else averaging(cached, run.average, batches),
        "online_step": online_step,
    }


def _predict_seconds(subject: Subject, name: str, teacher: TeacherSource | None, pilot: float) -> float:
    method = subject.method(name)
    student = method.student.eval()
    rows = np.arange(min(_batch(BATCH, pilot), len(subject.images)))
    given = teacher(subject.clean(rows), rows, 0) if teacher and method.teacher_at_inference else None

    @torch.inference_mode()
    def predict() -> Tensor:
        with torch.autocast(subject.device.type, torch.bfloat16, enabled=subject.bfloat16):
            return method.logits(student, subject.clean(rows), given)

    return median_seconds(predict, seconds=SECONDS, device=subject.device) / len(rows)


def _pass_seconds(subject: Subject, model: nn.Module, layers: tuple[int, ...], rows: np.ndarray) -> float:
    images = subject.clean(rows)
    return median_seconds(
        lambda: _attention(subject, model, layers, images), seconds=SECONDS / 2, device=subject.device
    )


def _attention(subject: Subject, model: nn.Module, layers: tuple[int, ...], images: Tensor) -> Tensor:
    with torch.autocast(subject.device.type, torch.bfloat16, enabled=subject.bfloat16):
        if subject.study.attention.content == "maps":
            return teacher_maps(model, images, layers)
        return teacher_attention(model, images, layers)


def _write(subject: Subject, teacher: str, model: nn.Module, folder: Path, batch: int) -> None:
    """One view of each of the subject's images, as the stage `cache` writes them."""
    layout = plan.teacher_layout(subject.study, teacher)
    keys = np.stack([np.arange(len(subject.images)), np.zeros(len(subject.images), np.int64)], axis=1)
    layers = tuple(range(layout.layers))
    with CacheWriter(folder, layout=layout, recipe={"measured": teacher}, keys=keys) as writer:
        for piece in writer.pending():
            for start in range(piece.start, piece.stop, batch):
                rows = np.arange(start, min(start + batch, piece.stop))
                writer.write(_attention(subject, model, layers, subject.labelled.render(rows, 0)).cpu())


def _read_speeds(folder: Path, batch: int) -> tuple[float, float]:
    """Bytes a second over all rows, once each in random order: the first time, and again."""
    reader = CacheReader(folder, expect=None)
    read_rows = reader.read_maps if reader.layout.content == "maps" else reader.read
    for path in folder.iterdir():
        _drop_from_page_cache(path)
    order = np.random.default_rng(0).permutation(len(reader))

    def read() -> None:
        for rows in _pieces(order, batch):
            read_rows(rows, 0)

    size = len(reader) * reader.layout.row_bytes
    return size / _elapsed(read), size / _elapsed(read)


def _pieces(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    yield from (values[start : start + size] for start in range(0, len(values), size))


def _drop_from_page_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):  # Linux
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _batch(wanted: int, seconds_an_image: float) -> int:
    """A batch whose work takes no longer than `LONGEST_STEP`."""
    return max(1, min(wanted, int(LONGEST_STEP / seconds_an_image)))


def _elapsed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
