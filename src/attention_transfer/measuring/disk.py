"""What a study will take on disk, to within headers, before anything is made."""

from __future__ import annotations

from typing import get_args

import torch

from attention_transfer import plan
from attention_transfer.assembly import CachedSet, Parts
from attention_transfer.config import Study
from attention_transfer.layout import Layout
from attention_transfer.measuring import memory
from attention_transfer.measuring.counts import Counts
from attention_transfer.measuring.forecast import recipe
from attention_transfer.transfer.cache_size import exact_bytes


def needed(study: Study, layout: Layout, counts: Counts, *, jobs: int) -> dict[str, int]:
    """Bytes by what they hold; images that stay in their files are left there, and take nothing more.

    Args:
        jobs: students that are trained at a time.
    """
    pixels = study.data.channels * study.data.image_size**2
    stored = 0 if study.data.source == "files" else (counts.train + counts.test) * pixels
    evaluation = study.evaluation
    rendered = sum(size for name, size in counts.shifted.items() if not _is_published(name, study)) * pixels
    runs = {name: memory.of_run(study, name, counts.classes) for name in study.runs}
    tutors = {name: memory.of_run(study.tutors, name, counts.classes) for name in study.finetuned_teachers}
    predicted = (
        study.data.validation * ("validation" in evaluation.sets)
        + counts.test * ("test" in evaluation.sets)
        + sum(counts.shifted.values())
    )
    # While a checkpoint is replaced, the old one and the new one are there.
    states = sorted((each.parameters * (each.of_a_parameter - 4) for each in runs.values()), reverse=True)
    found = {
        "images, decoded": stored,
        "shifted images": rendered,
        "teachers": 4 * sum(memory.parameters(study, name) for name in study.teachers),
        "cached attention": sum(_cache(study, layout, counts, name) for name in study.cached_teachers),
        "fine-tuned teachers": 4 * sum(each.saved for each in tutors.values()),
        "students": 4 * sum(each.saved for each in runs.values()) * len(study.seeds),
        "checkpoints": 2 * sum((states * len(study.seeds))[:jobs]),
        "predictions": len(study.grid) * predicted * (4 * counts.classes + 16),
    }
    if study.is_experiment:
        kept = ["students", "checkpoints", "predictions"]
        kept += ["images, decoded", "cached attention"] if study.own_data else []
        found = {name: size for name, size in found.items() if name in kept}
    return found


def _is_published(name: str, study: Study) -> bool:
    return any(name == key or name.startswith(f"{key}-") for key in study.evaluation.published)


def _cache(study: Study, layout: Layout, counts: Counts, teacher: str) -> int:
    row, parts = plan.teacher_layout(study, teacher), Parts(study, layout, torch.device("cpu"))
    sets = plan.cached_sets(study, teacher, test_images=counts.test)
    return sum(
        exact_bytes(sets[which], row, recipe(parts, teacher, which))
        for which in get_args(CachedSet)
        if which in sets
    )
