"""Figures of the report: each function draws one and returns it.

Colours are those of Okabe and Ito, safe for the colour-blind; a method has the same colour in every figure, and
runs differ by marker and line style too, so that the figures can be read in grey.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from attention_transfer.config import Report, Study
from attention_transfer.errors import StudyError, repro
from attention_transfer.evaluation.statistics import mean_interval
from attention_transfer.files import atomic
from attention_transfer.reporting.records import UNSHIFTED, Records
from attention_transfer.reporting.tables import plain

METHOD_COLOURS = {
    "scratch": "#000000",
    "finetune": "#0072B2",
    "copy": "#E69F00",
    "distill": "#D55E00",
    "linear_probe": "#CC79A7",
    "distill_features": "#009E73",
    "distill_logits": "#56B4E9",
}
MARKERS = ("o", "s", "^", "D", "v", "<", ">", "p", "h", "*", "P", "X")
LINES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (1, 2)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1)),
)
WIDTH = 5.2
"""Inches: a column of text at 150 dpi is legible on a phone."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "attention-transfer",
    "image.cmap": "cividis",
}
HEAT = 0.6  # share of the heat map in an overlay


@dataclass(frozen=True)
class Drawing:
    """One figure; `name` is its file name."""

    name: str
    caption: str
    figure: Figure
    raster: bool = False
    """Made of images: the page shows the PNG, else the SVG."""
    said: str = ""
    """Its numbers in words, for who does not see it."""

    @property
    def alternative(self) -> str:
        """What stands for the figure where it is not seen."""
        return f"{self.caption} {self.said}".strip()


@dataclass(frozen=True)
class Look:
    """How a run is drawn, everywhere."""

    color: str
    marker: str
    linestyle: Any
    zorder: float
    """Earlier runs lie on top: the main ones are named first."""


def looks(study: Study) -> dict[str, Look]:
    """A look for every run: the method's colour, paler for its later runs; marker and line by position."""
    seen = dict.fromkeys(METHOD_COLOURS, 0)
    found = {}
    for position, (name, run) in enumerate(study.runs.items()):
        pale = min(0.12 * seen[run.method], 0.36)  # of more it could not be seen on white
        seen[run.method] += 1
        found[name] = Look(
            to_hex([channel + pale * (1 - channel) for channel in to_rgb(METHOD_COLOURS[run.method])]),
            MARKERS[position % len(MARKERS)],
            LINES[position % len(LINES)],
            3 - 0.01 * position,
        )
    return found


def build(records: Records, report: Report, artifacts: Path) -> list[Drawing]:
    """The figures that the study's image sets and ensembles allow.

    Args:
        artifacts: the study's folder of large outputs; read are maps/maps.npz and shifts/contact_sheet.npz.

    Raises:
        StudyError: a file of images is missing or damaged.
    """
    with mpl.rc_context(STYLE):
        drawings = [_main(records), _learning_curves(records)]
        if records.study.ensembles:
            drawings.append(_ensembles(records))
            if len(records.study.ensembles) > 2:
                drawings.append(_ensemble_matrix(records))
        if "shifts" in records.study.evaluation.sets:
            drawings.append(_shift_severity(records))
            drawings.append(_contact_sheet(records, artifacts / "shifts" / "contact_sheet.npz"))
        drawings.append(_attention_maps(records, report, artifacts))
    return drawings


def write(drawings: list[Drawing], folder: Path) -> None:
    """Writes NAME.png (150 dpi) and NAME.svg of every figure; equal figures give equal bytes."""
    with mpl.rc_context(STYLE):
        for drawing in drawings:
            for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                with atomic(folder / f"{drawing.name}.{form}") as temporary:
                    drawing.figure.savefig(
                        temporary,
                        format=form,
                        dpi=150,
                        metadata=metadata,
                        bbox_inches="tight",
                        pad_inches=0.06,
                    )


def _level(records: Records) -> str:
    return f"{100 * records.study.evaluation.confidence:g} %"


def _main(records: Records) -> Drawing:
    study = records.study
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(study.runs)))
    axes = figure.add_subplot()
    for position, (run, look) in enumerate(looks(study).items()):
        values = 100 * records.values("accuracy", run)
        interval_row(axes, position, values, look, records)
    name_rows(axes, list(study.runs))
    axes.set_xlabel("test accuracy, %")
    caption = (
        f"Test accuracy by run. Marker and bar: mean over seeds and {_level(records)} interval; small points: "
        "single seeds. A bar that reaches the edge goes on beyond it."
    )
    said = say({run: 100 * records.values("accuracy", run) for run in study.runs}, records)
    return Drawing("main", caption, figure, said=said)


def say(values: Mapping[str, np.ndarray], records: Records) -> str:
    """Mean and interval of each, such as `scratch: 73.6 [73.2, 74.0]; finetune: ..`."""
    confidence = records.study.evaluation.confidence
    shown = {name: plain(mean_interval(found, confidence), digits=1) for name, found in values.items()}
    return "; ".join(f"{name}: {text}" for name, text in shown.items()) + "."


def interval_row(axes: Any, position: int, values: np.ndarray, look: Look, records: Records) -> None:
    """Single values as small points beneath their mean and interval."""
    interval = mean_interval(values, records.study.evaluation.confidence)
    axes.plot(
        values,
        np.full(len(values), position + 0.24),
        ".",
        color=look.color,
        alpha=0.65,
        markersize=4,
        zorder=2,
    )
    if math.isfinite(interval.low):
        axes.plot(
            [interval.low, interval.high], [position, position], color=look.color, linewidth=2, zorder=3
        )
    axes.plot(
        interval.mean, position, look.marker, color=look.color, markersize=6.5,
        markeredgecolor="white", markeredgewidth=0.7, zorder=4,
    )  # fmt: skip


def name_rows(axes: Any, names: list[str], include: tuple[float, ...] = ()) -> None:
    """Names at the rows, first row on top, and an x range that a huge interval of few seeds cannot blow up.

    `include`: values of x that are shown whatever the points are.
    """
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    points = np.concatenate(
        [include]
        + [
            np.atleast_1d(line.get_xdata()).astype(float)
            for line in axes.lines
            if line.get_marker() != "None"
        ]
    )
    low, high = points.min(), points.max()
    room = max(0.45 * (high - low), 0.2)
    shown = axes.get_xlim()
    axes.set_xlim(max(shown[0], low - room), min(shown[1], high + room))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _learning_curves(records: Records) -> Drawing:
    panels = {
        "task_loss": "task loss",
        "attention_loss": "attention loss",
        "feature_loss": "feature loss",
        "logit_loss": "logit loss",
        "validation_accuracy": "validation accuracy, %",
    }
    styles = looks(records.study)
    curves = records.curves.reindex(columns=["run", "epoch", *panels])  # few studies have all the losses
    shown = {key: label for key, label in panels.items() if curves[key].notna().any()}
    figure = Figure(
        figsize=(WIDTH, 0.6 + 1.8 * len(shown) + 0.2 * math.ceil(len(styles) / 3)), layout="constrained"
    )
    rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, label) in zip(rows, shown.items(), strict=True):
        for run, look in styles.items():
            curve = curves[curves.run == run][["epoch", key]].dropna()
            if curve.empty:
                continue
            by_epoch = curve.groupby("epoch")[key].agg(["mean", "min", "max"])
            by_epoch = by_epoch * (100 if key == "validation_accuracy" else 1)
            every = max(1, len(by_epoch) // 8)
            axes.plot(
                by_epoch.index, by_epoch["mean"], color=look.color, linestyle=look.linestyle,
                marker=look.marker, markevery=every, markersize=4, zorder=look.zorder,
            )  # fmt: skip
            axes.fill_between(
                by_epoch.index, by_epoch["min"], by_epoch["max"], color=look.color, alpha=0.15, linewidth=0
            )
        axes.set_ylabel(label)
        if key == "attention_loss" and _spans_decades(curves[key]):
            axes.set_yscale("log")
    rows[-1].set_xlabel("epoch")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, styles)
    caption = (
        "Learning curves: mean over seeds; the band spans the lowest and the highest seed. The attention loss "
        "is that of distilling runs, before its weight. Validation accuracy is that of the first "
        f"{records.study.training.curve_images} validation images."
    )
    return Drawing("learning_curves", caption, figure)


def _spans_decades(values: pd.Series) -> bool:
    positive = values[values > 0]
    return bool(len(positive)) and bool(positive.max() > 20 * positive.min())


def legend(figure: Figure, styles: dict[str, Look], columns: int = 3) -> None:
    """One legend beneath all panels."""
    handles = [
        Line2D([], [], color=look.color, linestyle=look.linestyle, marker=look.marker, label=run)
        for run, look in styles.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        handlelength=3.4,
    )


def _ensembles(records: Records) -> Drawing:
    study = records.study
    styles = looks(study)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.4 * len(study.ensembles)))
    axes = figure.add_subplot()
    axes.axvline(0, color="#555555", linewidth=1, zorder=1)
    for position, (name, ensemble) in enumerate(study.ensembles.items()):
        values = 100 * records.pairs(name)["gain"].to_numpy(float)
        first, second = (styles[member] for member in ensemble.members)
        interval_row(axes, position, values, first, records)
        if first != second:  # the mean's marker shows both members' colours
            axes.lines[-1].set(fillstyle="left", markerfacecoloralt=second.color, marker="o", markersize=8)
    name_rows(axes, list(study.ensembles), include=(0.0,))
    axes.set_xlabel("gain over the better member, points of test accuracy")
    caption = (
        f"Gain of each ensemble over its better member: mean over pairs and {_level(records)} interval; small "
        "points: single pairs. A marker of two colours has those of the two members."
    )
    gains = {name: 100 * records.pairs(name)["gain"].to_numpy(float) for name in study.ensembles}
    return Drawing("ensembles", caption, figure, said=say(gains, records))


def _ensemble_matrix(records: Records) -> Drawing:
    study = records.study
    order = list(study.runs)
    accuracies = {
        tuple(sorted(ensemble.members, key=order.index)): 100
        * records.pairs(name)["accuracy"].to_numpy(float)
        for name, ensemble in study.ensembles.items()
    }
    columns, rows = (
        [run for run in order if any(run == pair[place] for pair in accuracies)] for place in (0, 1)
    )
    cells = np.full((len(rows), len(columns)), math.nan)
    for (first, second), values in accuracies.items():
        cells[rows.index(second), columns.index(first)] = values.mean()
    figure = Figure(figsize=(min(2.2 + 1.0 * len(columns), 7.5), min(1.1 + 0.55 * len(rows), 7.0)))
    axes = figure.add_subplot()
    image = axes.imshow(cells, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
    for (first, second), values in accuracies.items():
        shown = plain(mean_interval(values, study.evaluation.confidence), digits=1)
        axes.text(
            columns.index(first),
            rows.index(second),
            shown.replace(" ", "\n", 1),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if values.mean() < middle else "black",
        )
    figure.colorbar(image, ax=axes, label="test accuracy, %")
    caption = (
        f"Test accuracy of the ensembles, mean over pairs and {_level(records)} interval; a run with itself is of two "
        "seeds. Empty: not in this study."
    )
    said = say({" + ".join(pair): values for pair, values in accuracies.items()}, records)
    return Drawing("ensemble_matrix", caption, figure, said=said)


def _shift_severity(records: Records) -> Drawing:
    study = records.study
    styles = looks(study)
    shifts, severities = study.evaluation.shifts, study.evaluation.severities
    columns = min(3, len(shifts))
    rows = math.ceil(len(shifts) / columns)
    size = (max(WIDTH, 2.45 * columns), 0.5 + 1.85 * rows + 0.2 * math.ceil(len(styles) / 4))
    figure = Figure(figsize=size, layout="constrained")
    grid: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    places = [0, *sorted(severities)]
    for axes, shift in itertools.zip_longest(grid.flat, shifts):
        if shift is None:
            axes.set_visible(False)
            continue
        for run, look in styles.items():
            levels = [records.values("accuracy", run, UNSHIFTED)]
            levels += [records.shifted("accuracy", run, shift, severity) for severity in places[1:]]
            lines = [mean_interval(100 * values, study.evaluation.confidence) for values in levels]
            axes.plot(
                places, [line.mean for line in lines],
                color=look.color, linestyle=look.linestyle, linewidth=1.1,
                marker=look.marker, markersize=3.5, zorder=look.zorder,
            )  # fmt: skip
        axes.set_title(shift.replace("_", " "), pad=3)
        axes.set_xticks(places, ["clean", *map(str, places[1:])])
    for row, column in np.ndindex(rows, columns):
        last = row * columns + column + columns >= len(shifts)
        grid[row, column].tick_params(labelbottom=last)
        grid[row, column].set(xlabel="severity" if last else None, ylabel=None if column else "accuracy, %")
    legend(figure, styles, columns=4 if columns == 3 else 3)
    caption = (
        "Accuracy against severity, one panel per shift, mean over seeds; intervals are in the table of shifts. "
        "'clean' is the whole test set, the shifted images are a part of it."
    )
    return Drawing("shift_severity", caption, figure)


def _images(records: Records, path: Path, stage: str, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    records.require_whole(path, stage)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise StudyError(
            f"is damaged: {error}",
            where=str(path),
            remedy=f"make it anew: {repro(stage, again=True)}",
        ) from error
    if missing := [key for key in keys if key not in arrays]:
        raise StudyError(
            f"lacks {', '.join(missing)}",
            where=str(path),
            remedy=f"make it anew: {repro(stage, again=True)}",
        )
    return arrays


def _rgb(images: np.ndarray) -> np.ndarray:
    """uint8 (..., C, H, W) with one or three channels to float (..., H, W, 3) within 0..1."""
    pictures = np.moveaxis(images, -3, -1) / 255.0
    return np.repeat(pictures, 3, axis=-1) if pictures.shape[-1] == 1 else pictures


def _mosaic(tiles: np.ndarray, gap: int) -> np.ndarray:
    """(rows, columns, H, W, 3) to one picture with white gaps, (rows (H + gap) - gap, .., 3)."""
    rows, columns, height, width, _ = tiles.shape
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1.0)
    picture = padded.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), columns * (width + gap), 3)
    return picture[: picture.shape[0] - gap, : picture.shape[1] - gap]


def _show(axes: Any, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_yticks([])


def _centres(count: int, side: int, gap: int) -> np.ndarray:
    return np.arange(count) * (side + gap) + (side - 1) / 2


def _contact_sheet(records: Records, path: Path) -> Drawing:
    arrays = _images(records, path, "shifts", ("sheet", "names", "severities"))
    sheet, names, severities = arrays["sheet"], arrays["names"], arrays["severities"]
    rows, columns, _, height, width = sheet.shape
    gap = max(1, height // 14)
    picture = _mosaic(_rgb(sheet), gap)
    tile = min(0.72, 5.2 / columns)
    figure = Figure(figsize=(1.4 + tile * columns, 0.5 + tile * rows * height / width))
    axes = figure.add_subplot()
    _show(axes, picture)
    axes.set_yticks(_centres(rows, height, gap), [str(name).replace("_", " ") for name in names])
    axes.set_xticks(_centres(columns, width, gap), [str(severity) for severity in severities])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("severity")
    return Drawing("contact_sheet", "What the shifts look like, by severity.", figure, raster=True)


def read_attention_maps(records: Records, artifacts: Path) -> dict[str, np.ndarray]:
    """What the stage `maps` has stored.

    Raises:
        StudyError: the file is missing or damaged.
    """
    path = artifacts / "maps" / "maps.npz"
    return _images(records, path, "maps", ("images", "classes", "layers", "names"))


def known_models(records: Records, maps: dict[str, np.ndarray]) -> list[str]:
    """Those of the stored models that the study has."""
    known = {"teacher", *records.study.runs}
    return [str(name) for name in maps["names"] if str(name) in known]


def _attention_maps(records: Records, report: Report, artifacts: Path) -> Drawing:
    arrays = read_attention_maps(records, artifacts)
    names = known_models(records, arrays)
    images = _rgb(arrays["images"][: report.attention_images])
    count, height, width, _ = images.shape
    gap = max(1, height // 14)
    heat = {name: _class_attention(arrays[f"maps_{name}"][:count], (width, height)) for name in names}
    columns = 1 + 3 * len(names)
    tile = 0.56
    figure = Figure(figsize=(tile * (columns + 1.4), 0.85 + tile * count * height / width))
    panels = figure.subplots(
        1, 4, gridspec_kw={"width_ratios": [1, *[len(names) + 0.08] * 3], "wspace": 0.06 * columns / 4}
    )
    _show(panels[0], _mosaic(images[:, None], gap))
    panels[0].set_xticks([(width - 1) / 2], ["image"], rotation=40, ha="left", rotation_mode="anchor")
    panels[0].xaxis.tick_top()
    for place, (axes, depth) in enumerate(zip(panels[1:], ("early", "middle", "last"), strict=True)):
        overlays = np.stack([_overlay(images, heat[name][:, place]) for name in names], axis=1)
        _show(axes, _mosaic(overlays, gap))
        axes.set_xticks(
            _centres(len(names), width, gap), names, rotation=40, ha="left", rotation_mode="anchor"
        )
        axes.xaxis.tick_top()
        axes.set_xlabel(f"{depth}: layer {int(arrays['layers'][place])}")
    for axes in panels:
        axes.tick_params(labelsize=7, pad=1)
    caption = (
        "Attention from the class token to the patches, mean over heads, upsampled over the image; brighter is "
        "more, each map scaled to its own range. Layers are counted from 0 at the input."
    )
    return Drawing("attention_maps", caption, figure, raster=True)


def _class_attention(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps (n, layers, heads, tokens, tokens) to heat within 0..1, (n, layers, height, width)."""
    attention = maps.mean(axis=2)[:, :, 0, 1:]
    side = math.isqrt(attention.shape[-1])
    heat = np.stack(
        [
            np.asarray(Image.fromarray(patch.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
            for patch in attention.reshape(-1, side, side)
        ]
    )
    low, high = heat.min(axis=(1, 2), keepdims=True), heat.max(axis=(1, 2), keepdims=True)
    scaled = (heat - low) / np.maximum(high - low, np.finfo(np.float32).tiny)
    return scaled.reshape(*attention.shape[:2], size[1], size[0])


def _overlay(images: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Images (n, H, W, 3) beneath heat (n, H, W)."""
    colours = mpl.colormaps["inferno"](heat)[..., :3]
    return (1 - HEAT) * images + HEAT * colours
