"""What a study will take on disk, and which attention is cached, from params.yaml before anything is made."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from attention_transfer.config import Architecture, AttentionCache, Data, Study
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout
from attention_transfer.transfer import cache_plan
from attention_transfer.transfer.cache_layout import Layout as CacheLayout

TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000  # before they have been read: Fashion-MNIST's
_ROOM_ENOUGH = 2**63


@dataclass(frozen=True)
class Choice:
    """Where students get a teacher's attention, and why; `str` is both in one line."""

    source: Literal["cache", "online"]
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def choose(source: Literal["cache", "online", "auto"], *, wanted: int, budget: float) -> Choice:
    """The rule behind `attention.source: auto`: a teacher is cached where its training views fit the budget.

    Args:
        source: as in params.yaml; a choice made there stands.
        wanted: bytes of the teacher's cached training views.
        budget: bytes allowed by `attention.budget_gb`.

    The reason. A transformer block computes (2 + mlp_ratio) x width + tokens floating-point operations for
    each byte of its queries and keys in float16: hundreds to thousands, where reading the byte takes about a
    nanosecond. So a cache costs little more than the passes of the teacher that fill it, even for a single
    student that reads every view once, and every further epoch, seed and run reads it for next to nothing.
    What can forbid it is room: hence the budget. Views that no run shows are a slip that `check` names.

    What does not enter, on purpose. The number of runs, epochs and seeds: a run or seed that is added must
    rerun nothing, and a rule that counts readers would move the runs that are already trained from one
    source to the other. Stopwatch and device: a study must not change where it runs. `plan` measures
    instead, and says what either source would take with the runs and seeds of the study.
    """
    size, allowed = f"{wanted / 1e9:.4g} GB", f"{budget / 1e9:.4g} GB"
    if source != "auto":
        return Choice(source, "params.yaml says so")
    if wanted <= budget:
        return Choice("cache", f"the training views, {size}, fit attention.budget_gb, {allowed}")
    return Choice("online", f"the training views would take {size}, more than attention.budget_gb, {allowed}")


def attention_source(study: Study, teacher: str) -> Choice:
    """`attention.source` resolved for a teacher: another teacher's size changes nothing for this one."""
    return choose(
        study.attention.source,
        wanted=_views_plan(study, teacher).bytes,
        budget=study.attention.budget_gb * 1e9,
    )


def cached_sets(study: Study, teacher: str, *, test_images: int = TEST_IMAGES) -> dict[str, int]:
    """Rows of each set that a teacher's cache holds; none where the teacher runs online."""
    if attention_source(study, teacher).source == "online":
        return {}
    sets = {"views": study.data.labelled * study.views.per_image, "validation": study.data.validation}
    return {**sets, "test": test_images} if "test" in study.evaluation.sets else sets


def cache_layout(architecture: Architecture, data: Data, attention: AttentionCache) -> CacheLayout:
    """Shape of one cached row: the attention of all layers for one view."""
    maps = attention.content == "maps"
    return CacheLayout(
        layers=architecture.depth,
        heads=architecture.heads,
        tokens=architecture.tokens(data.image_size),
        head_dim=None if maps else architecture.width // architecture.heads,
        dtype=attention.dtype,
        content=attention.content,
    )


def teacher_layout(study: Study, teacher: str) -> CacheLayout:
    """`cache_layout` of one of the study's teachers."""
    return cache_layout(study.teachers[teacher].architecture, study.data, study.attention)


def unread_views(study: Study) -> str:
    """A note where params.yaml asks for more views than any run will show: epoch e shows view e mod K."""
    epochs = [run.epochs for name, run in study.runs.items() if study.layers(name)]
    if not epochs or study.views.per_image <= max(epochs):
        return ""
    return (
        f"views.per_image: {study.views.per_image} is more than any run with attention transfer shows; "
        f"{max(epochs)} gives the same training images, and a smaller cache"
    )


def image_counts(layout: Layout) -> tuple[int, int, bool]:
    """Training and test images, and whether they have been read: before that, Fashion-MNIST's numbers."""
    paths = [layout.images / f"{split}_labels.npy" for split in ("train", "test")]
    if not all(path.is_file() for path in paths):
        return TRAIN_IMAGES, TEST_IMAGES, False
    train, test = (len(np.load(path, mmap_mode="r", allow_pickle=False)) for path in paths)
    return train, test, True


def check_room(study: Study, layout: Layout, params_file: Path, *, reserved: int = 0) -> int:
    """Refuses a study whose caches are over the budget or do not fit on the disk.

    Args:
        reserved: bytes that others will take.

    Returns:
        bytes that it will take, and the reserved ones.

    Raises:
        StudyError: bytes wanted and allowed, and the two ways out.
    """
    layout.artifacts.mkdir(parents=True, exist_ok=True)
    free = room = shutil.disk_usage(layout.artifacts).free
    free -= reserved
    for name in study.cached_teachers:
        if attention_source(study, name).source == "online":
            continue
        row = teacher_layout(study, name)
        views = study.data.labelled * study.views.per_image
        budget = study.attention.budget_gb * 1e9
        where = Path(f"{params_file}: teachers.{name}")
        held = _size(layout.cache(name))
        bias_heads = _bias_heads(study, name)
        cache_plan.plan(
            views, row, budget_bytes=budget, free_bytes=free + held, where=where, bias_heads=bias_heads
        )
        clean = study.data.validation + TEST_IMAGES
        free -= max(
            0,
            cache_plan.plan(
                views + clean,
                row,
                budget_bytes=None,
                free_bytes=free + held,
                where=where,
                bias_heads=3 * bias_heads,  # in each of the sets
            ).bytes
            - held,
        )
    pixels = study.data.channels * study.data.image_size**2
    images = len(study.evaluation.shifts) * len(study.evaluation.severities) * study.evaluation.shift_images
    wanted = images * pixels + len(study.grid) * (images + TEST_IMAGES) * 64  # shifted images, predictions
    if wanted > free:
        raise StudyError(
            f"the study would take {wanted / 1e9:.1f} GB beside its caches, and {max(free, 0) / 1e9:.1f} GB are free",
            where=str(params_file),
            remedy="free disk room, or lower evaluation.shift_images",
        )
    return room - free + wanted


def _views_plan(study: Study, teacher: str) -> cache_plan.Plan:
    views = study.data.labelled * study.views.per_image
    layout = teacher_layout(study, teacher)
    return cache_plan.plan(
        views,
        layout,
        budget_bytes=None,
        free_bytes=_ROOM_ENOUGH,
        where=Path(),
        bias_heads=_bias_heads(study, teacher),
    )


def _bias_heads(study: Study, teacher: str) -> int:
    """Heads of the bias that is stored once beside queries and keys; 0 without one."""
    architecture = study.teachers[teacher].architecture
    biased = "relative_bias" in architecture.components
    return architecture.heads if biased and study.attention.content == "queries_and_keys" else 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
