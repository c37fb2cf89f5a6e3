"""What a run gets of its teacher: from the cache, or by running the teacher on the images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from attention_transfer.assembly import CachedSet, Parts
from attention_transfer.evaluation.predictions import BATCH
from attention_transfer.models import students, vit
from attention_transfer.transfer.cache import CacheReader
from attention_transfer.transfer.method import Needs
from attention_transfer.transfer.teacher_source import (
    CachedTeacher,
    OnlineTeacher,
    TeacherSource,
    aligning,
    averaging,
    is_cached,
)


def teacher_source(
    parts: Parts, run: str, which: CachedSet | None, needs: Needs | None
) -> TeacherSource | None:
    """Where a run gets what it needs of its teacher; None if that is nothing.

    Args:
        which: the set of the images; None for images that are never cached.
    """
    if needs is None:
        return None
    over = parts.study.runs[run].average
    # The mean over examples is taken once, and then no other set is needed.
    source = _source(parts, run, "views" if over == "examples" else which, needs)
    source = aligning(source, needs, *vit.tokens(parts.study, run))
    with torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.bfloat16):
        return averaging(source, over, _labelled_views(parts))


def _source(parts: Parts, run: str, which: CachedSet | None, needs: Needs) -> TeacherSource:
    attention, chosen = parts.study.attention, parts.study.runs[run]
    if chosen.logit_loss is not None:
        folder = parts.layout.finetuned_teacher(chosen.logit_loss.teacher)
        tutor = students.load(folder, made_by="finetuned").to(parts.device)
        return OnlineTeacher(tutor, needs, attention.dtype, attention.content)
    if which and is_cached(needs, attention.content) and parts.attention_source(chosen.teacher) == "cache":
        recipe = parts.cache_recipe(chosen.teacher, which)
        reader = CacheReader(parts.layout.cache(chosen.teacher) / which, expect=recipe)
        return CachedTeacher(reader, needs)
    shared = chosen.drop_path if which == "views" and chosen.shares_stochastic_depth else 0.0
    return OnlineTeacher(
        parts.teacher(chosen.teacher), needs, attention.dtype, attention.content, shared_drop_path=shared
    )


def _labelled_views(parts: Parts) -> Iterator[tuple[Tensor, np.ndarray, int]]:
    """View 0 of every labelled image, in batches: images, their numbers, the view."""
    images = parts.labelled
    for rows in np.array_split(np.arange(len(images)), -(-len(images) // BATCH)):
        yield images.render(rows, 0), images.examples[rows], 0
