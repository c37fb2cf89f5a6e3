"""From measured speeds to times: caches, runs and stages of a study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from attention_transfer import plan
from attention_transfer.assembly import CachedSet, Parts
from attention_transfer.config import COPIES_ATTENTION, Pretrained, Study
from attention_transfer.data import shifted
from attention_transfer.data.pretraining_images import DIGITS
from attention_transfer.data.views import ViewRecipe
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout
from attention_transfer.measuring import counts
from attention_transfer.measuring.speeds import RunSpeed, Speeds
from attention_transfer.transfer.cache_size import exact_bytes

Source = Literal["cache", "online"]
STARTED_ONLY = ("data", "split", "finetuned", "shifts", "evaluate", "similarity", "maps", "report")
"""Stages of seconds, and one that few studies have, of which only the start is in the forecast."""


@dataclass(frozen=True)
class CachedSetPlan:
    """One set of a teacher's cache: bytes of all its files, seconds to write it."""

    rows: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class RunPlan:
    """Training of one run, for one seed.

    Attributes:
        steps: of the whole schedule.
        step: seconds of a step of the run's batch size, with attention from the resolved source.
        cached_step, online_step: the same by source; None without transfer.
        bytes: that a step reads from the cache; 0 without transfer.
        bandwidth: bytes a second that a cached step needs; 0 without transfer.
        train, predict: seconds of the two stages.
    """

    steps: int
    step: float
    cached_step: float | None
    online_step: float | None
    bytes: int
    bandwidth: float
    train: float
    predict: float


@dataclass(frozen=True)
class Forecast:
    """All of it.

    Attributes:
        sources: where the attention of each teacher comes from, and why.
        caches: by teacher and set, also where the source is online: what a cache would take.
        stages: seconds of all instances of a stage.
        by_source: seconds of cache and transfer runs together, by teacher, had all runs this source.
        counted: whether the images have been counted; else Fashion-MNIST's numbers stand in.
    """

    sources: dict[str, plan.Choice]
    caches: dict[str, dict[str, CachedSetPlan]]
    runs: dict[str, RunPlan]
    stages: dict[str, float]
    by_source: dict[str, dict[Source, float]]
    images: tuple[int, int]
    counted: bool

    @property
    def seconds(self) -> float:
        """Of the whole study, without DVC's own time."""
        return sum(self.stages.values())


def forecast(study: Study, layout: Layout, measured: Speeds) -> Forecast:
    """From speeds to times: a pure function but for the images that are counted where they exist."""
    train_images, test_images, counted = plan.image_counts(layout)
    sources = {name: plan.attention_source(study, name) for name in study.teachers}
    caches = {name: _cache(study, layout, measured, name, test_images) for name in study.cached_teachers}
    runs = {name: _run(study, measured, name, sources, test_images) for name in study.runs}
    seeds, start = len(study.seeds), measured.start
    written = {
        name: sum(part.seconds for part in cache.values()) if sources[name].source == "cache" else 0.0
        for name, cache in caches.items()
    }
    stages = {
        "pretrain": sum(start + _pretraining(study, measured, name, train_images) for name in study.teachers),
        "probe": start * len(study.teachers),
        "cache": sum(start + seconds for seconds in written.values()),
        "train": seeds * sum(run.train for run in runs.values()),
        "predict": seeds * sum(run.predict for run in runs.values()),
        "resolve": start * len(study.runs),
        **dict.fromkeys(STARTED_ONLY, start),
    }
    by_source = {name: _by_source(study, runs, cache, name) for name, cache in caches.items()}
    return Forecast(sources, caches, runs, stages, by_source, (train_images, test_images), counted)


def _cache(
    study: Study, layout: Layout, measured: Speeds, teacher: str, test_images: int
) -> dict[str, CachedSetPlan]:
    cached = study.model_copy(update={"attention": study.attention.model_copy(update={"source": "cache"})})
    parts, row = Parts(study, layout, torch.device("cpu")), plan.teacher_layout(study, teacher)
    sets = plan.cached_sets(cached, teacher, test_images=test_images)
    return {
        which: CachedSetPlan(
            sets[which],
            exact_bytes(sets[which], row, recipe(parts, teacher, which)),
            sets[which] * measured.teachers[teacher].write,
        )
        for which in get_args(CachedSet)
        if which in sets
    }


def recipe(parts: Parts, teacher: str, which: CachedSet) -> dict[str, Any]:
    """The recipe in a set's manifest; before its inputs are made, one of about its length."""
    try:
        return parts.cache_recipe(teacher, which)
    except StudyError:
        study, digest = parts.study, "0" * 64
        numbers = [0.123456] * study.data.channels
        views = ViewRecipe.of(study.views, dataset="", seed=0, mean=numbers, std=numbers).record()
        return {
            "teacher": digest,
            "dataset": digest[:16],
            "set": which,
            "keys": digest,
            "content": study.attention.content,
            "dtype": study.attention.dtype,
            "precision": study.training.precision,
            **({"views": views, "mixing": None} if which == "views" else {"mean": numbers, "std": numbers}),
        }


def _pretraining(study: Study, measured: Speeds, name: str, train_images: int) -> float:
    teacher, speed = study.teachers[name], measured.teachers[name]
    if not isinstance(teacher, Pretrained):
        return 0.0
    assert speed.pretraining_step is not None
    assert speed.pretraining_batch is not None
    images = counts.for_pretraining(study, teacher, train_images)
    steps = teacher.epochs * (images // teacher.batch_size)
    return steps * speed.pretraining_step * teacher.batch_size / speed.pretraining_batch


def _run(
    study: Study, measured: Speeds, name: str, sources: dict[str, plan.Choice], test_images: int
) -> RunPlan:
    run, speed, layers = study.runs[name], measured.runs[name], study.layers(name)
    teacher, source = measured.teachers[run.teacher], sources[run.teacher].source
    scale = run.batch_size / speed.batch
    cached, online = (
        None if step is None else step * scale for step in (speed.cached_step, speed.online_step)
    )
    step = _resolved(speed, source) * scale
    row = plan.teacher_layout(study, run.teacher)
    # For the rest the teacher runs in the step.
    reads = run.method in COPIES_ATTENTION and run.transfer != "value"
    size = run.batch_size * row.row_bytes * len(layers) // row.layers if reads else 0
    # A copy student needs the teacher's attention to predict: for clean images from the cache, if there is one.
    copies = run.method == "copy"
    computed = speed.predict + (teacher.forward if copies else 0.0)
    stored = speed.predict + (row.row_bytes / teacher.read if copies else 0.0)
    clean = stored if source == "cache" and reads else computed
    steps = run.epochs * (study.data.labelled // run.batch_size)
    curve = -(-run.epochs // study.training.validate_every) * study.training.curve_images
    sets = study.evaluation.sets
    shifts = sum("shift" in what for what in shifted.wanted(study.evaluation, study.data).values())
    seen = study.data.validation * ("validation" in sets) + test_images * ("test" in sets)
    unseen = shifts * study.evaluation.shift_images + DIGITS * (shifted.DIGITS in sets)
    return RunPlan(
        steps=steps,
        step=step,
        cached_step=cached,
        online_step=online,
        bytes=size,
        bandwidth=0.0 if cached is None else size / cached,
        train=measured.start + steps * step + (curve + study.data.validation) * clean,
        predict=measured.start + seen * clean + unseen * computed,
    )


def _resolved(speed: RunSpeed, source: Source) -> float:
    """Seconds of a measured step with attention from this source."""
    found = speed.step if speed.step is not None else getattr(speed, _STEP[source])
    return float(found)


_STEP: dict[Source, str] = {"cache": "cached_step", "online": "online_step"}


def _by_source(
    study: Study, runs: dict[str, RunPlan], cache: dict[str, CachedSetPlan], teacher: str
) -> dict[Source, float]:
    transfer = [
        run for name, run in runs.items() if study.runs[name].teacher == teacher and study.layers(name)
    ]
    if not transfer:
        return {}
    seeds = len(study.seeds)
    cached = seeds * sum(run.steps * (run.cached_step or 0.0) for run in transfer)
    online = seeds * sum(run.steps * (run.online_step or 0.0) for run in transfer)
    return {"cache": sum(part.seconds for part in cache.values()) + cached, "online": online}
