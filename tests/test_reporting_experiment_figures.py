"""Figures of experiments show the accuracies that they are of."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import synthetic_records as synthetic
from matplotlib.patches import Rectangle

from attention_transfer import config
from attention_transfer.reporting import experiment_figures
from attention_transfer.reporting.experiment_claims import COMPONENTS
from attention_transfer.reporting.experiments import Experiment
from attention_transfer.reporting.figures import Drawing
from attention_transfer.reporting.records import Records, load

FULL = Path(__file__).parents[1] / "presets" / "full.yaml"
full = functools.cache(lambda: config.experiments(FULL))  # it takes most of a second


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    study = synthetic.study(seeds=range(5))  # as many as any experiment has
    metrics, _ = synthetic.write(tmp_path_factory.mktemp("records"), study)
    return load(study, metrics)


def experiment(name: str) -> Experiment:
    """One of the full study's, with accuracies in the order of its runs."""
    study = full()[name]
    accuracy = {
        run: {seed: 0.8 + 0.001 * place + 0.0005 * seed for seed in study.seeds}
        for place, run in enumerate(study.runs)
    }
    return Experiment(name, study, accuracy)


def drawn(records: Records, name: str) -> Drawing:
    assert records.study.report is not None
    (drawing,) = experiment_figures.build([experiment(name)], records, records.study.report)
    assert drawing.name == f"experiment_{name}"
    return drawing


@pytest.mark.parametrize(
    ("name", "labels", "counts"),
    [
        ("layers", {"copy, first n", "copy, last n", "distill, first n", "distill, last n"}, range(7)),
        ("heads", {"copy", "distill"}, range(5)),
    ],
)
def test_lines_run_from_scratch_to_the_main_comparison(
    name: str, labels: set[str], counts: range, records: Records
) -> None:
    panels = drawn(records, name).figure.axes
    lines = {
        line.get_label(): line
        for axes in panels
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
    assert len(panels) == (2 if len(labels) > 2 else 1), "a panel a method, where it has several lines"
    assert set(lines) == labels
    scratch, finetune, copy = (records.values("accuracy", run) for run in ("scratch", "finetune", "copy"))
    found = experiment(name)
    for label, line in lines.items():
        assert list(line.get_xdata()) == list(counts)
        heights = np.asarray(line.get_ydata(), dtype=float)
        assert heights[0] == 0
        if str(label).startswith("copy"):
            gap = (finetune - scratch).mean()
            assert heights[-1] == pytest.approx(100 * (copy - scratch).mean() / gap)
            run = {"copy": "copy_heads_2", "copy, last n": "copy_last_2", "copy, first n": "copy_first_2"}[
                str(label)
            ]
            gains = [found.accuracy[run][seed] - scratch[seed] for seed in found.study.seeds]
            assert heights[2] == pytest.approx(100 * np.mean(gains) / gap)


def test_the_line_of_an_experiment_with_all_layers_ends_there(records: Records) -> None:
    (axes,) = drawn(records, "layers_rate").figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.lines}
    found, scratch = experiment("layers_rate"), records.values("accuracy", "scratch")
    gap = (records.values("accuracy", "finetune") - scratch).mean()
    gains = [found.accuracy["distill_rate"][seed] - scratch[seed] for seed in found.study.seeds]
    for end in ("first", "last"):
        assert lines[f"distill, {end} n"][-1] == pytest.approx(100 * np.mean(gains) / gap)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(COMPONENTS.values())))
def test_every_family_has_its_five_bars(name: str, records: Records) -> None:
    components = [component for component, its in COMPONENTS.items() if its == name]
    (axes,) = drawn(records, name).figure.axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(bars) == 5 * len(components)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == [component.replace("_", " ") for component in components]
    found, scratch = experiment(name), records.values("accuracy", "scratch")
    gains = [
        found.accuracy[f"copy_{components[0]}_plain"][seed] - scratch[seed] for seed in found.study.seeds
    ]
    assert bars[0].get_height() == pytest.approx(100 * np.mean(gains))


@pytest.mark.slow
def test_other_experiments_have_a_row_for_every_run(records: Records) -> None:
    for name in ("qkv", "task_data"):
        (axes,) = drawn(records, name).figure.axes
        assert [label.get_text() for label in axes.get_yticklabels()] == list(experiment(name).study.runs)
        dashed = [
            float(np.asarray(line.get_xdata())[0]) for line in axes.lines if line.get_linestyle() == "--"
        ]
        # With images of its own there is nothing of the main comparison to compare with.
        names = ["scratch", "finetune", "copy"] if name == "qkv" else []
        seeds = len(experiment(name).study.seeds)  # the first of the records'
        assert dashed == pytest.approx(
            [100 * records.values("accuracy", run)[:seeds].mean() for run in names]
        )
        assert [text.get_text() for text in axes.texts] == names


def test_an_experiment_without_test_accuracies_has_no_figure(records: Records) -> None:
    found = experiment("qkv")
    empty = Experiment("qkv", found.study, {run: {} for run in found.study.runs})
    assert records.study.report is not None
    assert experiment_figures.build([empty], records, records.study.report) == []
