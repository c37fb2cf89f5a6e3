"""What a study will take on disk, computed from params.yaml before anything is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from attention_transfer.config import Architecture, Data, Study
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout
from attention_transfer.transfer import cache

CLEAN_IMAGES = 10_000  # of the test set, before it has been read: Fashion-MNIST's


def cache_layout(
    architecture: Architecture, data: Data, dtype: Literal["float16", "float32"]
) -> cache.Layout:
    """Shape of one cached row: queries and keys of all layers for one view."""
    tokens = (data.image_size // architecture.patch_size) ** 2 + 1  # patches and class token
    return cache.Layout(
        layers=architecture.depth,
        heads=architecture.heads,
        tokens=tokens,
        head_dim=architecture.width // architecture.heads,
        dtype=dtype,
    )


def cache_sizes(study: Study) -> dict[str, int]:
    """Bytes of the cached training views of each teacher; none for a study without a cache."""
    if study.attention.source != "cache":
        return {}
    return {
        name: study.data.labelled
        * study.views.per_image
        * cache_layout(teacher.architecture, study.data, study.attention.dtype).row_bytes
        for name, teacher in study.teachers.items()
    }


def check_room(study: Study, layout: Layout, params_file: Path) -> None:
    """Refuses a study whose caches are over the budget or do not fit on the disk.

    Raises:
        StudyError: bytes wanted and allowed, and the two ways out.
    """
    layout.artifacts.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(layout.artifacts).free
    if study.attention.source == "cache":
        for name, teacher in study.teachers.items():
            row = cache_layout(teacher.architecture, study.data, study.attention.dtype)
            views = study.data.labelled * study.views.per_image
            budget = study.attention.budget_gb * 1e9
            where = Path(f"{params_file}: teachers.{name}")
            held = _size(layout.cache(name))
            cache.plan(views, row, budget_bytes=budget, free_bytes=free + held, where=where)
            clean = study.data.validation + CLEAN_IMAGES
            free -= max(
                0,
                cache.plan(views + clean, row, budget_bytes=None, free_bytes=free + held, where=where).bytes
                - held,
            )
    pixels = study.data.channels * study.data.image_size**2
    images = len(study.evaluation.shifts) * len(study.evaluation.severities) * study.evaluation.shift_images
    wanted = images * pixels + len(study.grid) * (images + CLEAN_IMAGES) * 64  # shifted images, predictions
    if wanted > free:
        raise StudyError(
            f"the study would take {wanted / 1e9:.1f} GB beside its caches, and {max(free, 0) / 1e9:.1f} GB are free",
            where=str(params_file),
            remedy="free disk room, or lower evaluation.shift_images",
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
