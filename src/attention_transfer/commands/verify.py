"""Checks every byte of a study's attention caches, and a sample of their rows against teacher and images."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass
class Checked:
    """What was found of one cached set.

    Attributes:
        which: name of the set; None for a teacher that needs no cache, `source` then says why.
        rows, intact: how many rows it has, and how many of them have their checksum; None if that cannot be told.
        divergence: of a sample of its maps from recomputed ones.
        problems: a damaged or missing file, a cache of another recipe (teacher, images, views, number format), or
            maps that differ from recomputed ones by more than number format and precision explain.
    """

    teacher: str
    which: str | None = None
    source: str = ""
    rows: int | None = None
    intact: int | None = None
    divergence: cached.Divergence | None = None
    problems: list[StudyError] = field(default_factory=list)

    def __str__(self) -> str:
        if self.which is None:
            return f"{self.teacher}: no cache ({self.source})"
        label, lines = f"{self.teacher} {self.which}", []
        if self.rows is not None:
            lines.append(f"{label}: {self.intact} of {self.rows} rows have their checksum")
        if (found := self.divergence) is not None:
            lines.append(
                f"{label}: KL from the recomputed maps of {found.rows} rows to the cached ones: mean "
                f"{found.mean:.2e}, maximum {found.maximum:.2e} nats; number format and precision explain at most "
                f"{found.explained_mean:.2e} and {found.explained_maximum:.2e}"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        problems = [
            {"where": each.where, "problem": each.problem, "remedy": each.remedy} for each in self.problems
        ]
        return {
            "teacher": self.teacher,
            "set": self.which,
            "rows": self.rows,
            "intact": self.intact,
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "problems": problems,
        }


def verify(study: Study, *, sample: int = SAMPLE, as_json: bool = False) -> list[StudyError]:
    """Prints what it finds in each cached set, and returns its problems."""
    found = []
    for checked in examine(study, sample):
        found.append(checked)
        if not as_json and (text := str(checked)):
            print(text)
    if as_json:
        print(json.dumps([checked.as_json() for checked in found]))
    return [problem for checked in found for problem in checked.problems]


def examine(study: Study, sample: int) -> Iterator[Checked]:
    """Each cached set that the study needs."""
    parts = Parts(study, Layout.of(study), machine.prepare())
    for teacher in study.cached_teachers:
        if not (sets := plan.cached_sets(study, teacher)):
            yield Checked(teacher, source=str(plan.attention_source(study, teacher)))
        for which in sets:
            yield _set(parts, teacher, which, sample)


def _set(parts: Parts, teacher: str, which: str, sample: int) -> Checked:
    folder, found = parts.layout.cache(teacher) / which, Checked(teacher, which)
    if not folder.exists():
        remedy = f"run the stage that writes it: {_repro(parts.study, teacher)}"
        found.problems = [
            StudyError("is missing: not made yet, or removed", where=str(folder), remedy=remedy)
        ]
        return found
    anew = f"make it anew, from its intact shards: {_repro(parts.study, teacher, again=True)}"
    try:
        progress = functools.partial(tqdm, desc=f"{teacher} {which}", unit="shard", delay=1)
        report = cache.verify(folder, progress=progress)
    except StudyError as error:  # unfinished, or a damaged manifest
        found.problems = [StudyError(error.problem, where=error.where, remedy=anew)]
        return found
    found.rows, found.intact = report.rows, report.intact
    if report.problems:
        found.problems = [StudyError(problem, where=str(folder), remedy=anew) for problem in report.problems]
        return found
    try:
        found.divergence = cached.recompute(parts, teacher, cached.cached_set(which), folder, count=sample)
    except StudyError as error:
        if Path(error.where).is_relative_to(
            folder
        ):  # of another recipe: its teacher may have to be made, too
            remedy = f"bring teacher and cache into line: {_repro(parts.study, teacher)}"
            error = StudyError(error.problem, where=error.where, remedy=remedy)
        found.problems = [error]
        return found
    found.problems = _unexplained(found.divergence, folder, _repro(parts.study, teacher, again=True))
    return found


def _unexplained(found: cached.Divergence, folder: Path, anew: str) -> list[StudyError]:
    if found.explained:
        return []
    return [
        StudyError(
            f"holds other maps than teacher and images give: KL mean {found.mean:.2e} and maximum "
            f"{found.maximum:.2e} nats, where at most {found.explained_mean:.2e} and "
            f"{found.explained_maximum:.2e} are explained",
            where=str(folder),
            remedy=f"delete this folder, whose shards are whole and would be kept, and make it anew: {anew}",
        )
    ]


def _repro(study: Study, teacher: str, *, again: bool = False) -> str:
    """The command that makes a teacher's cache, in the study's own graph."""
    graph = Path("studies") / study.name / "dvc.yaml"
    return repro(f"cache@{teacher}", again=again, graph=str(graph) if graph.exists() else "")
