"""`compare`: what differs between two studies, or between a study at two revisions: params, and results."""

from __future__ import annotations

import io
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from attention_transfer import params_yaml
from attention_transfer.errors import StudyError
from attention_transfer.evaluation.statistics import Interval, mean_interval, paired_difference
from attention_transfer.reporting.tables import NONE, per_cent

DEFAULT = Path("params.yaml")
SETS = ("test", "shifts", "validation")
CONFIDENCE = 0.95
ABSENT = "absent"
LONGEST = 60  # characters of a value in the table
_ENTRIES = (
    "runs",
    "teachers",
    "finetuned_teachers",
    "ensembles",
)  # sections of params.yaml with names of the user's


@dataclass(frozen=True)
class Side:
    """A study as it is in the working folder, or at a revision.

    Attributes:
        name: of the study, or of an experiment, such as full/qkv.
        revision: empty for the working folder.
    """

    name: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.revision}:{self.name}" if self.revision else self.name

    def read(self, path: Path) -> str | None:
        """A file's text; None where there is none."""
        if not self.revision:
            return path.read_text(encoding="utf-8") if path.exists() else None
        return _git("show", f"{self.revision}:./{path}")

    def params(self) -> dict[str, Any]:
        """The study's values by dotted key; of an experiment over those of the study that it extends."""
        base, _, experiment = self.name.partition("/")
        file = Path("presets") / f"{base}.yaml"
        text = self.read(file) or self.read(DEFAULT)
        if text is None or (values := params_yaml.parse(text, str(self))).get("name") != base:
            raise StudyError("there are no params of this study", where=str(self), remedy=_REMEDY)
        if experiment:
            file = file.with_suffix("") / f"{experiment}.yaml"
            if (text := self.read(file)) is None:
                raise StudyError("has no such experiment", where=str(self), remedy=_REMEDY)
            own = params_yaml.parse(text, str(self))
            own.pop("extends", None)
            kept = {key: value for key, value in values.items() if key not in ("runs", "ensembles")}
            for key, value in own.items():
                deep = key in ("data", "views", "attention", "evaluation") and isinstance(value, dict)
                kept[key] = {**kept.get(key, {}), **value} if deep else value
            values = kept
        return _flat(values)

    def accuracies(self) -> dict[tuple[str, str], dict[int, float]]:
        """By run and image set, accuracy by seed: under shift the mean over all shifts and severities."""
        base, _, experiment = self.name.partition("/")
        file = Path("metrics") / base / "evaluate" / experiment / "scores.csv"
        if (text := self.read(file)) is None:
            raise StudyError(
                f"has no results: {file} does not exist",
                where=str(self),
                remedy="run the study, or name a revision that has them",
            )
        try:
            frame = pd.read_csv(io.StringIO(text))
            means = frame.groupby(["run", "set", "seed"], sort=False)["accuracy"].mean()
        except (KeyError, ValueError) as error:
            raise StudyError(
                f"{file} cannot be read: {error}", where=str(self), remedy="make it again: dvc repro evaluate"
            ) from error
        found: dict[tuple[str, str], dict[int, float]] = {}
        for (run, which, seed), value in means.items():
            found.setdefault((str(run), str(which)), {})[int(seed)] = float(value)
        return found


_REMEDY = "give a study (core, full, full/qkv), a revision of git, or both: REVISION:STUDY"


def side(text: str) -> Side:
    """What an argument names: a study here, a revision of the default study, or REVISION:STUDY.

    Raises:
        StudyError: there is neither a study nor a revision of that name.
    """
    revision, colon, name = text.rpartition(":")
    default = str(params_yaml.read(DEFAULT).get("name"))
    if not colon:
        if text == default or (Path("presets") / f"{text}.yaml").exists():
            return Side(text)
        revision, name = text, default
    if _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}") is None:
        raise StudyError("is no study here and no revision", where=text, remedy=_REMEDY)
    return Side(name, revision)


def show(first: str, second: str, *, as_json: bool) -> None:
    """Prints what differs."""
    sides = side(first), side(second)
    values = [each.params() for each in sides]
    params = _params(*values)
    results = _results(*(each.accuracies() for each in sides))
    if as_json:
        print(
            json.dumps(
                {
                    "first": str(sides[0]),
                    "second": str(sides[1]),
                    "params": params,
                    "results": [row | {key: _numbers(row[key]) for key in _MEASURED} for row in results],
                },
                ensure_ascii=False,
            )
        )
        return
    names = [str(each) for each in sides]
    if params:
        rows = [[key, *map(_short, pair)] for key, pair in _folded(params, values).items()]
        print(tabulate(rows, ["param", *names], tablefmt="github", disable_numparse=True))
    else:
        print("The params are the same.")
    shown = [
        [row["run"], row["set"], *(per_cent(row[key]) if row[key] else NONE for key in _MEASURED), row["n"]]
        for row in results
    ]
    headers = [
        *("run", "images"),
        *(f"{name}: accuracy, %" for name in names),
        "second − first, points",
        "seeds in both",
    ]
    print(f"\n{tabulate(shown, headers, tablefmt='github', disable_numparse=True)}")
    print(
        f"\nMeans and {100 * CONFIDENCE:g} % intervals over seeds; differences are paired by the seeds that both have. "
        "Under shift: mean over all shifts and severities."
    )


_MEASURED = ("first", "second", "difference")


def _params(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """By key, the two values of what differs."""
    return {
        key: [first.get(key, ABSENT), second.get(key, ABSENT)]
        for key in dict.fromkeys([*first, *second])
        if first.get(key, ABSENT) != second.get(key, ABSENT)
    }


def _folded(params: Mapping[str, list[Any]], sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """`_params` with one line for a run, a teacher or an ensemble that a side does not have: what kind it is of."""
    had = [{_entry(key) for key in side} for side in sides]
    found: dict[str, list[Any]] = {}
    for key, pair in params.items():
        entry = _entry(key)
        if entry and not all(entry in entries for entries in had):
            found[entry] = [
                _kind(entry, side) if entry in of_side else ABSENT
                for side, of_side in zip(sides, had, strict=True)
            ]
        else:
            found[key] = pair
    return found


def _entry(key: str) -> str:
    """What a dotted key belongs to, such as `runs.copy`; empty for one that belongs to the whole study."""
    section, _, rest = key.partition(".")
    return f"{section}.{rest.partition('.')[0]}" if section in _ENTRIES and rest else ""


def _kind(entry: str, values: Mapping[str, Any]) -> str:
    names = (f"{entry}.{key}" for key in ("method", "kind", "run.method"))
    return next((str(values[name]) for name in names if name in values), "present")


def _results(
    first: Mapping[tuple[str, str], Mapping[int, float]],
    second: Mapping[tuple[str, str], Mapping[int, float]],
) -> list[dict[str, Any]]:
    """A row for each run and image set of either."""
    rows = []
    for run in dict.fromkeys(run for run, _ in [*first, *second]):
        for which in SETS:
            sides = [each.get((run, which), {}) for each in (first, second)]
            if not any(sides):
                continue
            both = sorted(set.intersection(*map(set, sides)))
            means = [mean_interval([*values.values()], CONFIDENCE) if values else None for values in sides]
            pairs = [[values[seed] for seed in both] for values in sides]
            difference = paired_difference(pairs[1], pairs[0], CONFIDENCE) if both else None
            rows.append(
                {"run": run, "set": which, "n": len(both)}
                | dict(zip(_MEASURED, (*means, difference), strict=True))
            )
    return rows


def _numbers(interval: Interval | None) -> list[float | None] | None:
    """Mean, low and high; null for a bound that one seed does not have."""
    if interval is None:
        return None
    values = (interval.mean, interval.low, interval.high)
    return [value if math.isfinite(value) else None for value in values]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; a section without any is none."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def _git(*arguments: str) -> str | None:
    try:
        told = subprocess.run(["git", *arguments], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.decode("utf-8", "replace")
