"""Figures of the experiments: each shows what an experiment varies, between the main comparison's two ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from attention_transfer.config import Report
from attention_transfer.evaluation.statistics import Interval, mean_interval
from attention_transfer.reporting.experiment_claims import COMPONENTS
from attention_transfer.reporting.experiments import Experiment, listed, references
from attention_transfer.reporting.figures import (
    METHOD_COLOURS,
    STYLE,
    WIDTH,
    Drawing,
    interval_row,
    looks,
    name_rows,
    say,
)
from attention_transfer.reporting.records import Records
from attention_transfer.reporting.tables import level

TRANSFERRING = ("copy", "distill")


@dataclass(frozen=True)
class Scale:
    """The main comparison's two ends, by seed.

    Attributes:
        names: of the runs that mean 0 and 1.
        gap: mean accuracy of the second minus that of the first.
    """

    names: tuple[str, str]
    scratch: Mapping[int, float]
    gap: float
    confidence: float

    @classmethod
    def of(cls, records: Records, report: Report) -> Scale:
        scratch, finetune = (
            dict(zip(records.study.seeds, records.values("accuracy", run).tolist(), strict=True))
            for run in (report.scratch, report.finetune)
        )
        gap = float(np.mean([finetune[seed] - scratch[seed] for seed in scratch]))
        return cls((report.scratch, report.finetune), scratch, gap, records.study.evaluation.confidence)

    def recovered(self, accuracy: Mapping[int, float]) -> Interval:
        """Per cent of the gap: over seeds, the gain over scratch, in units of the mean gap."""
        gains = [value - self.scratch[seed] for seed, value in accuracy.items() if seed in self.scratch]
        return mean_interval(100 * np.array(gains) / self.gap, self.confidence)


def build(experiments: Sequence[Experiment], records: Records, report: Report) -> list[Drawing]:
    """A figure for every experiment that has test accuracies."""
    with mpl.rc_context(STYLE):
        return [
            FIGURES.get(experiment.name, _rows)(experiment, records, report)
            for experiment in experiments
            if all(experiment.accuracy.values())
        ]


def _drawing(experiment: Experiment, caption: str, figure: Figure, records: Records) -> Drawing:
    accuracy = {run: 100 * np.array(list(found.values())) for run, found in experiment.accuracy.items()}
    said = f"Test accuracy in per cent: {say(accuracy, records)}"
    return Drawing(f"experiment_{experiment.name}", f"{experiment.heading}. {caption}", figure, said=said)


def _rows(experiment: Experiment, records: Records, report: Report) -> Drawing:
    """Every run's accuracy; lines where the main comparison's scratch and fine-tuned students are."""
    study = experiment.study
    figure = Figure(figsize=(WIDTH, 1.0 + 0.3 * len(study.runs)))
    axes = figure.add_subplot()
    for position, (run, look) in enumerate(looks(study).items()):
        values = 100 * np.array(list(experiment.accuracy[run].values()))
        interval_row(axes, position, values, look, records)
    beside = {run: 100 * value for run, value in references(experiment, records, report).items()}
    for run, value in beside.items():
        colour = METHOD_COLOURS[records.study.runs[run].method]
        axes.axvline(value, color=colour, linestyle="--", zorder=1)
        axes.annotate(
            run, (value, 1), xycoords=("data", "axes fraction"), xytext=(-2, 2), textcoords="offset points",
            rotation=30, fontsize=7, color="#333333", rotation_mode="anchor",
        )  # fmt: skip
    caption = (
        f"Test accuracy by run: mean over seeds and {level(records)} interval; small points: single seeds."
    )
    if beside:
        caption += f" Dashed: {listed(beside)} of the main comparison, means over the same seeds."
    name_rows(axes, list(study.runs), include=tuple(beside.values()))
    low, high = axes.get_xlim()
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))  # the lines are not the edges
    axes.set_xlabel("test accuracy, %")
    return _drawing(experiment, caption, figure, records)


def _layers(experiment: Experiment, records: Records, report: Report) -> Drawing:
    """Gap recovered by the number of layers, counted from the input or from the output."""
    series: dict[tuple[str, str], dict[int, Mapping[int, float]]] = {}
    study = experiment.study
    for name, run in study.runs.items():
        layers, depth = study.layers(name), study.architecture(name).depth
        if run.method in TRANSFERRING and layers:
            for end, those in (("first", range(len(layers))), ("last", range(depth - len(layers), depth))):
                if layers == tuple(those):
                    series.setdefault((run.method, end), {})[len(layers)] = experiment.accuracy[name]
    depth = max((study.architecture(name).depth for name in study.runs), default=0)
    return _by_count(
        experiment,
        records,
        report,
        series={
            f"{method}, {end} n": (method, "-" if end == "first" else "--", points)
            for (method, end), points in series.items()
        },
        whole=depth,
        label="layers transferred",
    )


def _heads(experiment: Experiment, records: Records, report: Report) -> Drawing:
    """Gap recovered by the number of heads in every layer."""
    study = experiment.study
    series: dict[str, dict[int, Mapping[int, float]]] = {}
    for name, run in study.runs.items():
        counts = {len(heads) for heads in study.heads(name)}
        if run.method in TRANSFERRING and len(counts) == 1:
            series.setdefault(run.method, {})[counts.pop()] = experiment.accuracy[name]
    heads = max((study.architecture(name).heads for name in study.runs), default=0)
    return _by_count(
        experiment,
        records,
        report,
        series={method: (method, "-", points) for method, points in series.items()},
        whole=heads,
        label="heads transferred in every layer",
    )


def _by_count(
    experiment: Experiment,
    records: Records,
    report: Report,
    *,
    series: Mapping[str, tuple[str, str, dict[int, Mapping[int, float]]]],
    whole: int,
    label: str,
) -> Drawing:
    """Lines with bands; with nothing handed over a run is scratch, with everything, if the experiment has no such run,
    that of the main comparison.

    Methods share a panel unless they have several lines each: one scale would hide the smaller effect.
    """
    scale = Scale.of(records, report)
    methods = list(dict.fromkeys(method for method, *_ in series.values()))
    apart = len(series) > len(methods)
    figure = Figure(figsize=(WIDTH, 3.4))
    panels = figure.subplots(1, len(methods) if apart else 1, squeeze=False)[0]
    panel_of = dict(zip(methods, panels if apart else itertools.repeat(panels[0]), strict=False))
    for axes in panels:
        for end in (0, 100):
            axes.axhline(end, color="#555555", linewidth=1, zorder=1)
    for place, (name, (method, line, points)) in enumerate(series.items()):
        found = {0: Interval(0, 0, 0, 1)} | {n: scale.recovered(points[n]) for n in sorted(points)}
        if whole not in found:
            found[whole] = scale.recovered(_of_main(method, records, report))
        x, axes = list(found), panel_of[method]
        axes.plot(
            x, [interval.mean for interval in found.values()],
            color=METHOD_COLOURS[method], linestyle=line, marker="os^D"[place % 4], label=name, zorder=3,
        )  # fmt: skip
        axes.fill_between(
            x,
            [interval.low for interval in found.values()],
            [interval.high for interval in found.values()],
            color=METHOD_COLOURS[method], alpha=0.12, linewidth=0,
        )  # fmt: skip
    for axes in panels:
        _keep_in_sight(axes, [each for each in series.values() if panel_of[each[0]] is axes], scale)
        axes.set_xlabel(f"{label}, of {whole}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("gap recovered, %")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3)
    figure.set_layout_engine("constrained")
    caption = (
        f"Gap recovered, in per cent of the mean gap between {scale.names[0]} (0) and {scale.names[1]} (100), by the "
        f"number of {label}: mean over seeds and {level(records)} interval, which goes on beyond an edge that it "
        "reaches."
    )
    if not all(whole in points for *_, points in series.values()):
        caption += " The right end is the main comparison's run."
    return _drawing(experiment, caption, figure, records)


def _of_main(method: str, records: Records, report: Report) -> dict[int, float]:
    """Accuracy by seed of the main comparison's run with all layers and heads."""
    run = {"copy": report.copied, "distill": report.distilled}[method]
    return dict(zip(records.study.seeds, records.values("accuracy", run).tolist(), strict=True))


def _keep_in_sight(
    axes: Axes, series: Iterable[tuple[str, str, dict[int, Mapping[int, float]]]], scale: Scale
) -> None:
    """Limits that the wide intervals of few seeds cannot blow up."""
    means = [
        0.0,
        100.0,
        *(scale.recovered(values).mean for *_, points in series for values in points.values()),
    ]
    room = 0.35 * (max(means) - min(means))
    axes.set_ylim(min(means) - room, max(means) + room)


def _families(experiment: Experiment, records: Records, report: Report) -> Drawing:
    """Bars above or below scratch: a plain student, one with the teacher's components, and those alone."""
    scale, study = Scale.of(records, report), experiment.study
    groups: dict[str, dict[tuple[str, str], Interval]] = {}
    for name, run in study.runs.items():
        components = study.teachers[run.teacher].architecture.components
        if not components or run.method not in (*TRANSFERRING, "scratch"):
            continue
        matched = study.architecture(name).components == components
        kind = "alone" if run.method == "scratch" else "matched" if matched else "plain"
        gains = [value - scale.scratch[seed] for seed, value in experiment.accuracy[name].items()]
        groups.setdefault(", ".join(components), {})[run.method, kind] = mean_interval(
            100 * np.array(gains), scale.confidence
        )
    bars = [
        ("copy", "plain"),
        ("copy", "matched"),
        ("distill", "plain"),
        ("distill", "matched"),
        ("scratch", "alone"),
    ]
    hatches = {"plain": "", "matched": "////", "alone": ""}
    figure = Figure(figsize=(WIDTH + 1.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, found in enumerate(groups.values()):
        for offset, key in enumerate(bars):
            if key in found:
                _bar(axes, place + 0.16 * (offset - 2), found[key], METHOD_COLOURS[key[0]], hatches[key[1]])
    means = [interval.mean for found in groups.values() for interval in found.values()]
    room = 0.4 * max(max(means, default=0.0) - min(means, default=0.0), 1.0)
    axes.set_ylim(min([*means, 0.0]) - room, max([*means, 0.0]) + room)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(groups)), [name.replace("_", " ") for name in groups], rotation=25, ha="right")
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(f"accuracy minus {scale.names[0]}, points")
    handles = [
        Patch(
            facecolor=METHOD_COLOURS[method],
            hatch=hatches[kind],
            edgecolor="white",
            label=f"{method}, {kind}",
        )
        for method, kind in bars
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    caption = (
        "Teachers with a component of another family: test accuracy minus that of the plain student from scratch, mean "
        f"over seeds and {level(records)} interval (cut off at the edge where few seeds leave it wide). Plain: the "
        "student lacks the component; matched: it has it; alone: from scratch, with the component and without transfer."
    )
    return _drawing(experiment, caption, figure, records)


def _bar(axes: Axes, x: float, interval: Interval, colour: str, hatch: str) -> None:
    axes.bar(
        x, interval.mean, width=0.15, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, zorder=2
    )
    if math.isfinite(interval.low):
        ends = [interval.low, interval.high]
        for of_line, width in (("white", 2.6), ("#333333", 1.0)):  # to be seen on a black bar, too
            axes.add_line(Line2D([x, x], ends, color=of_line, linewidth=width, zorder=3))


FIGURES: dict[str, Callable[[Experiment, Records, Report], Drawing]] = {
    "layers": _layers,
    "layers_rate": _layers,
    "heads": _heads,
    **dict.fromkeys(COMPONENTS.values(), _families),
}
"""By experiment; the others are rows of intervals."""
