"""What a study's stages have to do: floating-point operations, and images to decode."""

from __future__ import annotations

from dataclasses import dataclass

from attention_transfer import plan
from attention_transfer.config import MomentumContrast, Pretrained, Run, SelfDistillation, Study
from attention_transfer.measuring import flops_of_runs
from attention_transfer.measuring.counts import Counts, for_pretraining

SIMILARITY_IMAGES = 500  # as pipeline/similarity.py
STATISTICS = 10_000  # evenly spaced images, about so many, have their mean taken: as data/images.py
STUDENTS = ("train", "predict")
"""Stages that go side by side; before the others `run` waits until nothing is at work."""
OF_AN_EXPERIMENT = (*STUDENTS, "similarity")
NOT_COUNTED = "split, resolve, evaluate, maps, report; of probe the logistic regression"


@dataclass(frozen=True)
class Stage:
    """One instance of a stage.

    Attributes:
        flops: of matrix products.
        images: that are shown, and decoded where they stay in files.
        shared: whether several processes do it together.
    """

    kind: str
    name: str
    flops: int
    images: int
    shared: bool


def stages(study: Study, counts: Counts, *, recomputing: bool = False) -> list[Stage]:
    """All of a study's, in the order in which they run; of an experiment those that it has for itself.

    Args:
        recomputing: whether activations are computed again in the backward pass of a training.
    """
    found = [
        Stage("data", "", 0, _sampled(counts.train), False),
        *(_pretrain(study, counts, name) for name in study.teachers),
        *(_probe(study, name) for name in study.teachers),
        *(stage for name in study.cached_teachers for stage in _cache(study, counts, name)),
        *_finetuned(study, counts, recomputing=recomputing),
        *_shifts(study),
    ]
    for name, seed in study.grid:
        found.append(_train(study, counts, name, seed, recomputing=recomputing))
        found.append(_predict(study, counts, name, seed))
    found += [_similarity(study, counts)] if "test" in study.evaluation.sets else []
    kinds = (*OF_AN_EXPERIMENT, *(("data", "cache") if study.own_data else ()))
    return [stage for stage in found if not study.is_experiment or stage.kind in kinds]


def steps(study: Study, run: Run) -> int:
    """Of a run's whole schedule."""
    return run.epochs * (study.data.labelled // run.batch_size)


def _sampled(train: int) -> int:
    return len(range(0, train, max(1, train // STATISTICS)))


def _pretrain(study: Study, counts: Counts, name: str) -> Stage:
    teacher = study.teachers[name]
    if not isinstance(teacher, Pretrained):
        return Stage("pretrain", name, 0, 0, True)
    images = for_pretraining(study, teacher, counts.train)
    shown = teacher.epochs * (images // teacher.batch_size) * teacher.batch_size
    alone = isinstance(teacher, MomentumContrast | SelfDistillation)
    decoded = shown * (2 if alone else 1) if teacher.images not in ("digits", "fractals") else 0
    return Stage("pretrain", name, shown * flops_of_runs.pretraining(study, name), decoded, not alone)


def _probe(study: Study, name: str) -> Stage:
    images = study.data.labelled + study.data.validation
    model = flops_of_runs.model(study, study.teachers[name].architecture, 0)
    return Stage("probe", name, images * model.forward, images, False)


def _cache(study: Study, counts: Counts, name: str) -> list[Stage]:
    rows = sum(plan.cached_sets(study, name, test_images=counts.test).values())
    return [Stage("cache", name, rows * flops_of_runs.reading(study, name), rows, True)] if rows else []


def _finetuned(study: Study, counts: Counts, *, recomputing: bool) -> list[Stage]:
    """One after another in one stage."""
    each = [
        _train(study.tutors, counts, name, tutor.seed, recomputing=recomputing)
        for name, tutor in study.finetuned_teachers.items()
    ]
    flops, images = sum(stage.flops for stage in each), sum(stage.images for stage in each)
    return [Stage("finetuned", "", flops, images, False)] if each else []


def _shifts(study: Study) -> list[Stage]:
    evaluation = study.evaluation
    made = len(evaluation.shifts) * len(evaluation.severities) * ("shifts" in evaluation.sets)
    return [Stage("shifts", "", 0, made * evaluation.shift_images, False)] if made else []


def _train(study: Study, counts: Counts, name: str, seed: int, *, recomputing: bool) -> Stage:
    run, training = study.runs[name], study.training
    work = flops_of_runs.training(study, name, counts.classes).both
    clean = flops_of_runs.predicting(study, name, counts.classes, cached=True)
    again = clean.student if recomputing and run.method != "linear_probe" else 0
    shown = steps(study, run) * run.batch_size
    validated = -(-run.epochs // training.validate_every) * training.curve_images + study.data.validation
    flops = shown * (work + again) + validated * clean.both
    return Stage("train", f"{name}-{seed}", flops, shown + validated, True)


def _predict(study: Study, counts: Counts, name: str, seed: int) -> Stage:
    sets = study.evaluation.sets
    clean = study.data.validation * ("validation" in sets) + counts.test * ("test" in sets)
    others = sum(counts.shifted.values())
    flops = sum(
        images * flops_of_runs.predicting(study, name, counts.classes, cached=cached).both
        for images, cached in ((clean, True), (others, False))
    )
    return Stage("predict", f"{name}-{seed}", flops, clean + others, True)


def _similarity(study: Study, counts: Counts) -> Stage:
    """Every teacher once, every student once a seed."""
    images = min(SIMILARITY_IMAGES, counts.test)
    teachers = {run.teacher for run in study.runs.values()}
    flops = sum(flops_of_runs.model(study, study.teachers[name].architecture, 0).forward for name in teachers)
    for name, _ in study.grid:
        flops += flops_of_runs.predicting(study, name, counts.classes, cached=False).both
    return Stage("similarity", "", images * flops, images * (len(teachers) + len(study.grid)), False)
