"""`status`: which stages would run now and why, which wait for them, and how long that took the last time."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from attention_transfer.commands.repro import family, waits_for
from attention_transfer.errors import StudyError

SHOWN = 3  # reasons named in a row


@dataclass(frozen=True)
class Stale:
    """A stage that would run.

    Attributes:
        reasons: what has changed; empty for one that only waits for others, and runs if their outputs change.
        seconds: that it took the last time, or that others of its family took; None if that is not known.
    """

    stage: str
    reasons: tuple[str, ...]
    seconds: float | None


def show(graph: Path, metrics: Path, *, as_json: bool) -> None:
    """Prints what `dvc repro` of this graph would do.

    Args:
        graph: path of a dvc.yaml.
        metrics: the study's folder of records.
    """
    found = examine(graph, metrics)
    if as_json:
        stages = [{"stage": each.stage, "reasons": each.reasons, "seconds": each.seconds} for each in found]
        print(json.dumps(stages, ensure_ascii=False))
        return
    if not found:
        print(f"{graph}: all stages are up to date")
        return
    rows = []
    for kind in dict.fromkeys(family(each.stage) for each in found):
        of_kind = [each for each in found if family(each.stage) == kind]
        changed = [each for each in of_kind if each.reasons]
        reasons = dict.fromkeys(reason for each in changed for reason in each.reasons)
        rows.append(
            [
                kind,
                len(changed) or "",
                len(of_kind) - len(changed) or "",
                _listing([*reasons]),
                _time(of_kind),
            ]
        )
    headers = ["stage", "to run", "if these change", "why", "time, one at a time"]
    print(tabulate(rows, headers, tablefmt="simple", disable_numparse=True))
    if any(each.seconds is not None for each in found):
        whole = f"All of them: {_time(found)}, from the times of earlier runs."
    else:
        whole = "None of them has run yet; `plan` forecasts their times."
    print(f"\n{whole} To run them: dvc repro {graph}")


def examine(graph: Path, metrics: Path) -> list[Stale]:
    """The stages that would run, in an order in which they can.

    Raises:
        StudyError: there is no such graph, or DVC cannot read it.
    """
    before = waits_for(graph)
    # A study's report waits for its experiments, which have graphs of their own.
    changed = _status(sorted({stage.rpartition(":")[0] or str(graph) for stage in before}))
    took = dict(_took(metrics))
    by_family: dict[str, list[float]] = {}
    for stage, seconds in took.items():
        by_family.setdefault(family(stage), []).append(seconds)
    found: list[Stale] = []
    reached: set[str] = set()
    for stage, awaited in before.items():
        reasons = tuple(dict.fromkeys(_reasons(changed.get(stage, []))))
        if reasons or awaited & reached:
            reached.add(stage)
            times = by_family.get(family(stage))
            own = took.get(stage.rpartition(":")[2])
            found.append(Stale(stage, reasons, statistics.median(times) if own is None and times else own))
    return found


def _status(graphs: Sequence[str]) -> Mapping[str, list[Any]]:
    """By stage, what DVC finds changed."""
    command = [sys.executable, "-m", "dvc", "status", "--json", *graphs]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    try:
        if told.returncode == 0:
            found: Mapping[str, list[Any]] = json.loads(told.stdout)
            return found
        problem = told.stderr
    except ValueError:
        problem = told.stdout
    raise StudyError(
        f"DVC cannot tell its state: {problem.strip()[:500]}",
        where=graphs[0],
        remedy=f"correct what it names; dvc status {graphs[0]} says whether it is right",
    )


def _reasons(changes: list[Any]) -> Iterator[str]:
    """DVC's list of changes in a few words each."""
    for change in changes:
        if not isinstance(change, dict):
            yield {"changed command": "another command"}.get(change, str(change))
            continue
        for path, state in change.get("changed deps", {}).items():
            if isinstance(state, dict):  # keys of a params file
                yield from state
            elif path.startswith(("src/", "pipeline/")):
                yield "code"
            elif state == "deleted":
                yield "inputs are missing"
            elif state == "new":
                yield "never run"
            else:
                yield path
        if outs := change.get("changed outs", {}):
            yield (
                "outputs are missing"
                if set(outs.values()) <= {"deleted", "not in cache"}
                else "outputs have changed"
            )


def _took(metrics: Path) -> Iterator[tuple[str, float]]:
    """Stage and seconds of each record that a study has."""
    for path in sorted(metrics.glob("**/run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            yield str(record["dvc"]["stage"]).rpartition(":")[2], float(record["seconds"])
        except (KeyError, TypeError, ValueError):
            continue  # made without DVC, or damaged: the stage that reads it will say so


def _listing(reasons: list[str]) -> str:
    more = f" and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return ", ".join(reasons[:SHOWN]) + more


def _time(stages: list[Stale]) -> str:
    known = [each.seconds for each in stages if each.seconds is not None]
    if not known:
        return "not known"
    total = sum(known)
    shown = f"{math.ceil(total)} s" if total < 120 else f"{math.ceil(total / 60)} min"
    return shown if len(known) == len(stages) else f"at least {shown}"
