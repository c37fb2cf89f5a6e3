"""Heat maps of how alike models are, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from attention_transfer.config import Report
from attention_transfer.reporting.figures import STYLE, Drawing
from attention_transfer.reporting.records import Records

TILE = 1.15  # inches, of a panel


def build(records: Records, report: Report) -> list[Drawing]:
    """CKA between all layers of two models, and the divergence of their maps; nothing without test images."""
    if records.similarity.empty:
        return []
    with mpl.rc_context(STYLE):
        return [_cka(records, report), _divergence(records, report)]


def _names(report: Report) -> dict[str, str]:
    """What models are compared with, as readers know it."""
    return {"teacher": "its teacher", "finetune": report.finetune}


def _cka(records: Records, report: Report) -> Drawing:
    """A panel a run and reference: rows are its layers, columns those of what it is compared with."""
    panels_of = {
        pair: group.groupby(["layer", "reference_layer"])["cka"].mean().unstack()
        for pair, group in records.cka.groupby(["reference", "run"], sort=False)
    }
    references = list(dict.fromkeys(records.cka["reference"]))
    runs = [run for run in records.study.runs if run in set(records.cka["run"])]
    figure = Figure(figsize=(0.9 + TILE * len(runs), 0.7 + TILE * len(references)), layout="constrained")
    panels = figure.subplots(len(references), len(runs), squeeze=False)
    shown: Any = None
    for row, reference in enumerate(references):
        for column, run in enumerate(runs):
            axes = panels[row, column]
            if (reference, run) not in panels_of:
                axes.set_axis_off()  # a model is not compared with itself
                continue
            shown = axes.imshow(panels_of[reference, run], vmin=0, vmax=1, origin="lower")
            _quiet(axes)
            if row == 0 or not panels[row - 1, column].axison:
                axes.set_title(run, fontsize=8)
            if column == 0 or not panels[row, column - 1].axison:
                axes.set_ylabel("its layer", fontsize=7)
            axes.set_xlabel(f"layer of {_names(report)[reference]}", fontsize=7)
    figure.colorbar(shown, ax=panels, label="CKA", shrink=0.8)
    caption = (
        "Linear CKA of the mean of the patch tokens behind every layer, between a run's layers and those of its "
        "teacher or of the fine-tuned student of the same seed (of the next seed, for that student itself), on the "
        "same test images; mean over seeds. Layers are counted from 0 at the input."
    )
    return Drawing("cka", caption, figure)


def _divergence(records: Records, report: Report) -> Drawing:
    """A row a run, a column a layer: head by head, and under the best assignment of heads."""
    frame = records.similarity
    references = list(dict.fromkeys(frame["reference"]))
    kinds = {"divergence": "head by head", "matched_divergence": "heads matched"}
    tables = {
        (reference, kind): _by_layer(frame[frame["reference"] == reference], kind, list(records.study.runs))
        for reference in references
        for kind in kinds
    }
    highest = max(float(np.nanmax(table.to_numpy())) for table in tables.values())
    rows = max(len(table) for table in tables.values())
    figure = Figure(figsize=(7.2, 0.9 + (0.55 + 0.24 * rows) * len(references)), layout="constrained")
    panels = figure.subplots(len(references), len(kinds), squeeze=False)
    shown: Any = None
    for axes, ((reference, kind), table) in zip(panels.ravel(), tables.items(), strict=True):
        shown = axes.imshow(table, vmin=0, vmax=highest, aspect="auto")
        axes.set_title(f"from {_names(report)[reference]}, {kinds[kind]}", fontsize=8)
        axes.set_yticks(range(len(table)), table.index)
        axes.set_xticks(range(table.shape[1]), table.columns)
        _quiet(axes, ticks=True)
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    figure.colorbar(shown, ax=panels, label="divergence, nats", shrink=0.8)
    caption = (
        "Jensen-Shannon divergence of the attention maps from those of the teacher, or of the fine-tuned student of "
        "the same seed (of the next seed, for that student itself): mean over heads, test images and seeds; under the "
        "best assignment of one model's heads to the other's on the right."
    )
    return Drawing("divergence", caption, figure)


def _by_layer(frame: pd.DataFrame, measure: str, runs: Sequence[str]) -> pd.DataFrame:
    table = frame.groupby(["run", "layer"])[measure].mean().unstack()
    return table.reindex([run for run in runs if run in table.index])


def _quiet(axes: Any, *, ticks: bool = False) -> None:
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7)
    if not ticks:
        axes.set_xticks([])
        axes.set_yticks([])
