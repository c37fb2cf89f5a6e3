"""Checks every byte of a study's attention caches, and a sample of their rows against teacher and images."""

from __future__ import annotations

import functools
from pathlib import Path

from tqdm import tqdm

from attention_transfer import plan
from attention_transfer.assembly import Parts
from attention_transfer.commands import cached
from attention_transfer.config import Study
from attention_transfer.errors import StudyError, repro
from attention_transfer.layout import Layout
from attention_transfer.training import machine
from attention_transfer.transfer import cache

SAMPLE = 32  # rows of each set


def verify(study: Study, *, sample: int = SAMPLE) -> list[StudyError]:
    """Prints what it finds in each cached set, and returns its problems.

    A problem is a damaged or missing file, a cache of another recipe (teacher, images, views, number format),
    or maps that differ from recomputed ones by more than number format and precision explain.
    """
    parts = Parts(study, Layout.of(study), machine.prepare())
    problems = []
    for teacher in study.cached_teachers:
        if not (sets := plan.cached_sets(study, teacher)):
            print(f"{teacher}: no cache ({plan.attention_source(study, teacher)})")
        for which in sets:
            problems += _verify_set(parts, teacher, which, sample)
    return problems


def _verify_set(parts: Parts, teacher: str, which: str, sample: int) -> list[StudyError]:
    folder, label = parts.layout.cache(teacher) / which, f"{teacher} {which}"
    anew = f"make it anew, from its intact shards: {_repro(parts.study, teacher, again=True)}"
    try:
        progress = functools.partial(tqdm, desc=label, unit="shard", delay=1)
        report = cache.verify(folder, progress=progress)
        print(f"{label}: {report.intact} of {report.rows} rows have their checksum")
    except StudyError as error:  # unfinished, or a damaged manifest
        return [StudyError(error.problem, where=error.where, remedy=anew)]
    if report.problems:
        return [StudyError(problem, where=str(folder), remedy=anew) for problem in report.problems]
    try:
        found = cached.recompute(parts, teacher, cached.cached_set(which), folder, count=sample)
    except StudyError as error:
        if Path(error.where).is_relative_to(
            folder
        ):  # of another recipe: its teacher may have to be made, too
            remedy = f"bring teacher and cache into line: {_repro(parts.study, teacher)}"
            return [StudyError(error.problem, where=error.where, remedy=remedy)]
        return [error]
    print(
        f"{label}: KL from the recomputed maps of {found.rows} rows to the cached ones: mean {found.mean:.2e}, "
        f"maximum {found.maximum:.2e} nats; number format and precision explain at most "
        f"{found.explained_mean:.2e} and {found.explained_maximum:.2e}"
    )
    if found.explained:
        return []
    return [
        StudyError(
            f"holds other maps than teacher and images give: KL mean {found.mean:.2e} and maximum "
            f"{found.maximum:.2e} nats, where at most {found.explained_mean:.2e} and "
            f"{found.explained_maximum:.2e} are explained",
            where=str(folder),
            remedy=f"delete this folder, whose shards are whole and would be kept, and make it anew: "
            f"{_repro(parts.study, teacher, again=True)}",
        )
    ]


def _repro(study: Study, teacher: str, *, again: bool = False) -> str:
    """The command that makes a teacher's cache, in the study's own graph."""
    graph = Path("studies") / study.name / "dvc.yaml"
    return repro(f"cache@{teacher}", again=again, graph=str(graph) if graph.exists() else "")
