"""Charts of the page: Vega-Lite specifications, made from the same numbers as the figures.

A chart has the colours of the figures. What is black there has the colour of the text here: a dark page shows it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from attention_transfer.config import Report, Study
from attention_transfer.evaluation.statistics import Interval, mean_interval
from attention_transfer.reporting.experiments import Experiment, listed, references
from attention_transfer.reporting.figures import METHOD_COLOURS, looks
from attention_transfer.reporting.records import UNSHIFTED, Records
from attention_transfer.reporting.tables import level

SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-left", "triangle-right")
DASHES = ([1, 0], [6, 3], [6, 3, 1, 3], [1, 3], [10, 3], [3, 2, 1, 2])
TEXT_COLOUR = "currentColor"
ALL_SHIFTS = "all shifts"
ROW = 26
"""Pixels."""
CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **{f"{part}Color": TEXT_COLOUR for part in ("label", "title", "tick", "domain", "grid")},
        **{"gridOpacity": 0.15, "titleFontWeight": "normal", "labelLimit": 220},
        **{"labelFontSize": 12, "titleFontSize": 12, "tickCount": 8},
    },
    "legend": {"labelColor": TEXT_COLOUR, "titleColor": TEXT_COLOUR, "labelFontSize": 12, "labelLimit": 220},
    "text": {"color": TEXT_COLOUR},
}


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: of the figure that it stands for where the page may run scripts.
        spec: Vega-Lite.
        caption: where it is not that of the figure.
    """

    name: str
    spec: dict[str, Any]
    caption: str = ""


def build(records: Records, experiments: Sequence[Experiment], report: Report) -> list[Chart]:
    """Main comparison, ensembles, shift viewer, and every experiment."""
    study = records.study
    found = [_main(records)]
    if study.ensembles:
        found.append(_ensembles(records))
    if "shifts" in study.evaluation.sets:
        found += _shifts(records)
    found += [_experiment(each, records, report) for each in experiments if all(each.accuracy.values())]
    return found


def _main(records: Records) -> Chart:
    values = {run: _by_seed(records, run) for run in records.study.runs}
    return _rows("main", "test accuracy, %", values, _colours(records.study), records)


def _ensembles(records: Records) -> Chart:
    colours, values, paint = _colours(records.study), {}, {}
    for name, ensemble in records.study.ensembles.items():
        pairs = records.pairs(name)
        seeds = [f"{first} and {second}" for first, second in pairs["second_seed"].items()]
        values[name] = dict(zip(seeds, 100 * pairs["gain"].to_numpy(float), strict=True))
        paint[name] = colours[ensemble.members[1]]
    lines = {"the better member": 0.0}
    caption = (
        f"Gain of each ensemble over its better member: mean over pairs and {level(records)} interval; small points: "
        "single pairs. The colour is that of the second member."
    )
    label = "gain over the better member, points"
    return _rows("ensembles", label, values, paint, records, caption=caption, lines=lines, zero=True)


def _experiment(experiment: Experiment, records: Records, report: Report) -> Chart:
    values = {
        run: {str(seed): 100 * value for seed, value in found.items()}
        for run, found in experiment.accuracy.items()
    }
    caption = (
        f"{experiment.heading}: test accuracy by run. Marker and bar: mean over seeds and {level(records)} interval; "
        "small points: single seeds. A bar that reaches the edge goes on beyond it."
    )
    lines = {run: 100 * value for run, value in references(experiment, records, report).items()}
    if lines:
        caption += f" Dashed: {listed(lines)} of the main comparison, means over the same seeds."
    name = f"experiment_{experiment.name}"
    colours = _colours(experiment.study)
    return _rows(name, "test accuracy, %", values, colours, records, caption=caption, lines=lines)


def _by_seed(records: Records, run: str) -> dict[str, float]:
    return dict(zip(map(str, records.study.seeds), 100 * records.values("accuracy", run), strict=True))


def _colours(study: Study) -> dict[str, str]:
    black = METHOD_COLOURS["scratch"]
    return {run: TEXT_COLOUR if look.color == black else look.color for run, look in looks(study).items()}


def _rows(
    name: str,
    label: str,
    values: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
    records: Records,
    *,
    caption: str = "",
    lines: Mapping[str, float] | None = None,
    zero: bool = False,
) -> Chart:
    """A row for each run: mean and interval, with single values beneath.

    Args:
        values: by run and seed.
        lines: by what they mean, upright lines.
        zero: whether 0 is within the range.
    """
    lines = lines or {}
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for position, (run, found) in enumerate(values.items()):
        interval = mean_interval(list(found.values()), records.study.evaluation.confidence)
        rows.append(
            {"run": run, "colour": colours[run], "shape": SHAPES[position % len(SHAPES)]}
            | _spread(run, interval)
        )
        points += [
            {"run": run, "colour": colours[run], "seed": seed, "value": round(value, 4)}
            | {"said": f"{run}, seed {seed}: {value:.2f}"}
            for seed, value in found.items()
        ]
    in_sight = [point["value"] for point in points] + list(lines.values()) + ([0.0] if zero else [])
    low, high = min(in_sight), max(in_sight)
    room = max(0.45 * (high - low), 0.2)  # a huge interval of few seeds is cut off, as in the figures
    scale = alt.Scale(domain=[low - room, high + room], zero=False, nice=False)
    y = alt.Y("run:N", sort=None, title=None, axis=alt.Axis(grid=False))
    colour = alt.Color("colour:N", scale=None, legend=None)
    shown, said = _tooltip("run", label), alt.Description("said:N")
    bars = (
        alt.Chart(_data(rows)).mark_rule(strokeWidth=3, clip=True, aria=False)
        .encode(y=y, x=alt.X("low:Q", title=label, scale=scale), x2="high:Q", color=colour, tooltip=shown)
    )  # fmt: skip
    means = (
        alt.Chart(_data(rows)).mark_point(size=90, filled=True, opacity=1, clip=True)
        .encode(y=y, x=alt.X("mean:Q", title=label), color=colour, tooltip=shown, description=said)
        .encode(shape=alt.Shape("shape:N", scale=None, legend=None))
    )  # fmt: skip
    singles = (
        alt.Chart(_data(points)).mark_circle(size=16, opacity=0.65, yOffset=9, clip=True)
        .encode(y=y, x=alt.X("value:Q", title=label), color=colour, description=said)
        .encode(tooltip=["run:N", "seed:N", alt.Tooltip("value:Q", title=label, format=".2f")])
    )  # fmt: skip
    layers = [singles, bars, means]
    if lines:
        ruled = [{"line": line, "value": value} for line, value in lines.items()]
        x, tip = alt.X("value:Q", title=label), [alt.Tooltip("line:N"), alt.Tooltip("value:Q", format=".2f")]
        rules = alt.Chart(_data(ruled)).mark_rule(
            strokeDash=[5, 4], color=TEXT_COLOUR, opacity=0.6, aria=False
        )
        names = alt.Chart(_data(ruled)).mark_text(
            align="left", angle=330, color=TEXT_COLOUR, fontSize=11, aria=False
        )
        layers.insert(0, rules.encode(x=x, tooltip=tip))
        layers.append(names.encode(x=x, y=alt.YValue(-4), text="line:N"))
    return _finished(name, alt.layer(*layers), ROW * len(rows), caption)


def _shifts(records: Records) -> list[Chart]:
    """Accuracy against severity of the chosen shift, and each run's at the chosen severity."""
    chosen_shift = alt.param(name="shift", value=ALL_SHIFTS)
    chosen_severity = alt.param(name="severity", value=max(records.study.evaluation.severities))
    data = _data(_shift_rows(records))
    label = "accuracy, %"
    range_of_accuracy = alt.Scale(zero=False)
    shown = _tooltip("run", label, "severity")
    of_shift = alt.Chart(data).transform_filter("datum.shift === shift")
    at_severity = of_shift.transform_filter("datum.severity === severity")
    looks_of = {
        "color": alt.Color("colour:N", scale=None, legend=None),
        "shape": alt.Shape("shape:N", scale=None, legend=None),
        "description": alt.Description("said:N"),
        "tooltip": shown,
    }
    x = alt.X("severity:O", title="severity; 0: not shifted", axis=alt.Axis(labelAngle=0))
    y = alt.Y("mean:Q", title=label, scale=range_of_accuracy)
    lines = of_shift.mark_line(aria=False).encode(
        x=x, y=y, color=looks_of["color"], detail="run:N", strokeDash=alt.StrokeDash("dash:N", scale=None)
    )
    points = of_shift.mark_point(filled=True, size=50, opacity=1).encode(x=x, y=y, **looks_of)
    here = at_severity.transform_aggregate(groupby=["severity"]).mark_rule(
        opacity=0.12, strokeWidth=18, color=TEXT_COLOUR, aria=False
    )
    run = alt.Y("run:N", sort=None, title=None, axis=alt.Axis(grid=False))
    low = alt.X("low:Q", title=label, scale=range_of_accuracy)
    bars = at_severity.mark_rule(strokeWidth=3, aria=False).encode(
        y=run, x=low, x2="high:Q", color=looks_of["color"], tooltip=shown
    )
    mean = alt.X("mean:Q", title=label, scale=range_of_accuracy)
    means = at_severity.mark_point(filled=True, size=90, opacity=1).encode(y=run, x=mean, **looks_of)
    caption = (
        "Accuracy against the severity of the chosen shift, and beneath it each run at the chosen severity: mean over "
        f"seeds and {level(records)} interval. Severity 0 is the same images without shift."
    )
    height = ROW * len(records.study.runs)
    return [
        _finished(name, alt.layer(*layers).add_params(chosen_shift, chosen_severity), height, caption)
        for name, layers, height in (
            ("shift_severity", (lines, points, here.encode(x=x)), 260),
            ("shift_runs", (bars, means), height),
        )
    ]


def _shift_rows(records: Records) -> list[dict[str, Any]]:
    """A row for each run, shift (or all of them) and severity, of which 0 is without shift."""
    study = records.study
    colours = _colours(study)
    rows = []
    for position, run in enumerate(study.runs):
        look = {
            "run": run,
            "colour": colours[run],
            "shape": SHAPES[position % len(SHAPES)],
            "dash": DASHES[position % len(DASHES)],
        }
        for shift in (ALL_SHIFTS, *study.evaluation.shifts):
            for severity in (0, *sorted(study.evaluation.severities)):
                values = 100 * _shifted(records, run, shift, severity)
                interval = mean_interval(values, study.evaluation.confidence)
                rows.append(
                    look | {"shift": shift.replace("_", " "), "severity": severity} | _spread(run, interval)
                )
    return rows


def _shifted(records: Records, run: str, shift: str, severity: int) -> np.ndarray:
    """Accuracy by seed; without a shift that on the whole test set."""
    if not severity:
        return records.values("accuracy", run, UNSHIFTED)
    if shift != ALL_SHIFTS:
        return records.shifted("accuracy", run, shift, severity)
    every = [records.shifted("accuracy", run, each, severity) for each in records.study.evaluation.shifts]
    return np.asarray(np.mean(every, axis=0))


def _spread(run: str, interval: Interval) -> dict[str, Any]:
    """Mean and, where there are any, bounds (JSON has no NaN), and the same in words, for who hears the page."""
    named = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    found: dict[str, Any] = {key: round(value, 4) for key, value in named.items() if math.isfinite(value)}
    bounds = f" [{interval.low:.2f}, {interval.high:.2f}]" if len(found) == len(named) else ""
    return found | {"said": f"{run}: {interval.mean:.2f}{bounds}"}


def _data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def _tooltip(name: str, label: str, *more: str) -> list[alt.Tooltip]:
    bounds = [alt.Tooltip(f"{bound}:Q", format=".2f") for bound in ("low", "high")]
    return [
        alt.Tooltip(f"{name}:N"),
        *(alt.Tooltip(f"{each}:O") for each in more),
        alt.Tooltip("mean:Q", title=label, format=".2f"),
        *bounds,
    ]


def _finished(name: str, chart: alt.LayerChart | alt.FacetChart, height: int, caption: str) -> Chart:
    spec = chart.properties(width="container", height=height).to_dict()
    return Chart(name, spec | {"config": CONFIG}, caption)
