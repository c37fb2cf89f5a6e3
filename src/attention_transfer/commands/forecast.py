"""`plan`: what caches, steps and stages will take here, from a few measured batches."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from attention_transfer import plan, provenance
from attention_transfer.config import Study
from attention_transfer.files import TEMPORARY, write_text
from attention_transfer.layout import Layout
from attention_transfer.measuring import speeds
from attention_transfer.measuring.clock import LEAST, WARM_UP
from attention_transfer.measuring.forecast import STARTED_ONLY, Forecast, forecast
from attention_transfer.measuring.speeds import Speeds
from attention_transfer.training import machine

FORECAST = "forecast.txt"
SECONDS_A_TEACHER, SECONDS_A_RUN = 8, 2  # roughly, on two cores
OF_EXPERIMENTS = ("resolve", "train", "predict", "evaluate", "similarity")
OF_DATA = ("data", "split", "cache")  # beside those, of an experiment with data of its own


def show(
    study: Study, experiments: Mapping[str, Study], params_file: Path, *, as_json: bool, keep: bool
) -> None:
    """Measures, and prints the forecast as tables or as JSON.

    Args:
        experiments: those that extend the study, by name.
        keep: whether to keep the tables for MLflow, which shows them with the study.
    """
    layout, device = Layout.of(study), machine.prepare()
    everything = _with_runs_of(study, experiments)
    seconds = SECONDS_A_TEACHER * len(everything.teachers) + SECONDS_A_RUN * len(everything.runs)
    print(f"measuring for about {seconds} s ..", file=sys.stderr)
    near = layout.artifacts if layout.artifacts.is_dir() else Path()  # on the disk that the caches will be on
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}-", dir=near) as folder:
        measured = speeds.measure(everything, device, Path(folder))
    found = forecast(study, layout, measured)
    more = {name: of_experiment(each, measured) for name, each in experiments.items()}
    table = _experiments(experiments, found, more)
    text = _text(study, params_file, device, measured, found, experiments=table)
    if keep:
        write_text(layout.own / FORECAST, text)
    print(_json(study, device, measured, found, more) if as_json else text)


def _with_runs_of(study: Study, experiments: Mapping[str, Study]) -> Study:
    runs = {name: run for each in (study, *experiments.values()) for name, run in each.runs.items()}
    return study.model_copy(update={"runs": runs})


def of_experiment(experiment: Study, measured: Speeds) -> float:
    """Seconds of the stages that an experiment has for itself."""
    stages = forecast(experiment, Layout.of(experiment), measured).stages
    return sum(stages[name] for name in (*OF_EXPERIMENTS, *(OF_DATA if experiment.own_data else ())))


def _experiments(experiments: Mapping[str, Study], found: Forecast, more: Mapping[str, float]) -> str:
    rows = [[name, len(each.runs), len(each.seeds), _time(more[name])] for name, each in experiments.items()]
    if not rows:
        return ""
    whole = found.seconds + sum(more.values())
    headers = ["experiment", "runs", "seeds", "time"]
    return _table(
        "Experiments, by themselves", headers, [*rows, ["all, and the study", "", "", _time(whole)]]
    )


def statement(study: Study, device: torch.device, measured: Speeds, found: Forecast) -> list[str]:
    """What was measured, and what was not."""
    smaller = sorted(
        name for name, speed in measured.runs.items() if speed.batch < study.runs[name].batch_size
    )
    rows = ", ".join(f"{name} {speed.rows}" for name, speed in measured.teachers.items())
    lines = [
        f"device {device.type}, {torch.get_num_threads()} threads, {study.training.precision}, load average "
        f"{measured.load:.1f} before it began; random images of the "
        "study's shape, its architectures with random weights, its methods and batch sizes",
        f"steps: after {WARM_UP} to warm up, the median of those in {speeds.SECONDS:g} s, at least {LEAST}, by the "
        "study's own training loop (images, attention, both passes, optimiser); runs that differ in "
        "learning rates alone once",
        "passes (teacher, predictions): the same, without gradients",
        f"cache: a temporary one, written as the stage does and removed (rows: {rows}), read once after the page "
        "cache has dropped it where the system allows that, checksums verified, and once more",
        f"start: {_time(measured.start)}, one process that imports what a stage imports",
        f"not measured: DVC's own time, and the work of {', '.join(STARTED_ONLY)}, probe and resolve, whose start "
        "alone is in the forecast",
    ]
    if smaller:
        lines.append(f"measured in smaller batches, and scaled by images: {', '.join(smaller)}")
    if not found.counted:
        lines.append(
            f"images are not there yet: {found.images[0]} for training and {found.images[1]} for testing stand in"
        )
    return lines


def _json(
    study: Study, device: torch.device, measured: Speeds, found: Forecast, more: Mapping[str, float]
) -> str:
    values = {
        "study": study.name,
        "machine": {**provenance.machine(), "device": device.type, "threads": torch.get_num_threads()},
        "measured": asdict(measured),
        **asdict(found),
        "seconds": found.seconds,
        "experiments": dict(more),
        "statement": statement(study, device, measured, found),
        "notes": _notes(study, measured, found),
    }
    return json.dumps(values, indent=1, sort_keys=True, allow_nan=False)


def _text(
    study: Study,
    params_file: Path,
    device: torch.device,
    measured: Speeds,
    found: Forecast,
    *,
    experiments: str,
) -> str:
    caches = [
        [teacher, which, part.rows, part.bytes, _time(part.seconds)]
        for teacher, sets in found.caches.items()
        for which, part in sets.items()
    ]
    teachers = [
        [
            name,
            f"{speed.forward * 1e3:.3g}",
            f"{speed.write * 1e3:.3g}",
            _rate(speed.first_read),
            _rate(speed.read),
        ]
        for name, speed in measured.teachers.items()
    ]
    runs = [
        [
            name,
            run.steps,
            *(_milliseconds(value) for value in (run.step, run.cached_step, run.online_step)),
            f"{run.bytes / 1e6:.3g}" if run.bytes else "",
            _rate(run.bandwidth) if run.bytes else "",
            _time(run.train),
            _time(run.predict),
        ]
        for name, run in found.runs.items()
    ]
    stages = [[name, _time(seconds)] for name, seconds in found.stages.items()]
    sections = [
        f"{params_file}: study {study.name}, {len(study.runs)} runs x {len(study.seeds)} seeds",
        "\n".join(f"attention of {name}: {choice}" for name, choice in found.sources.items()),
        _table("Cache on disk", ["teacher", "set", "rows", "bytes", "to write"], caches),
        _table(
            "Teachers",
            ["teacher", "pass, ms/image", "write, ms/row", "first reading, GB/s", "reading, GB/s"],
            teachers,
        ),
        _table(
            "Runs, one seed",
            [
                "run", "steps", "step, ms", "cached", "online", "cache, MB/step", "GB/s needed", "train", "predict",
            ],
            runs,
        ),
        _table("Stages, all instances", ["stage", "time"], [*stages, ["all", _time(found.seconds)]]),
        experiments,
        "\n".join(_notes(study, measured, found)),
        "Measured: " + ";\n  ".join(statement(study, device, measured, found)) + ".",
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section)


def _notes(study: Study, measured: Speeds, found: Forecast) -> list[str]:
    lines = [note] if (note := plan.unread_views(study)) else []
    if measured.load > (cores := provenance.machine()["cores"]):
        lines.append(
            f"The machine was busy before this began (load average {measured.load:.1f} on {cores} cores): on an "
            "idle one all times are shorter"
        )
    for name, by_source in found.by_source.items():
        if by_source:
            lines.append(
                f"transfer runs of {name}, all seeds: {_time(by_source['cache'])} with a cache, its writing "
                f"included, {_time(by_source['online'])} online"
            )
    return lines


def _table(title: str, headers: list[str], rows: list[list[Any]]) -> str:
    return f"{title}\n{tabulate(rows, headers, tablefmt='simple', disable_numparse=True)}" if rows else ""


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.3g}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}"
