"""What a training's run shows beside its own metrics: what later stages have found of it, and what it cost.

A test accuracy is known when `evaluate` has run, long after the training's run in MLflow has ended.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

Accuracies = Mapping[tuple[str, str], Mapping[str, float]]
"""By run and seed: test_accuracy, shift_accuracy."""


def accuracies(evaluate: Path) -> Accuracies:
    """Of every run and seed in a folder of `evaluate`; empty where that has not run.

    The accuracy under shift is the mean over shifts and severities.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    scores = evaluate / "scores.csv"
    if scores.exists():
        names = {"test": "test_accuracy", "shifts": "shift_accuracy"}
        with scores.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if name := names.get(row["set"]):
                    found[row["run"], row["seed"]][name].append(float(row["accuracy"]))
    return {key: {name: fmean(values) for name, values in by_name.items()} for key, by_name in found.items()}


def cost(record: Mapping[str, Any], steps: float | None) -> dict[str, float]:
    """Seconds, seconds a step and peak memory of a training.

    Args:
        record: its run.json.
        steps: how many it took; None where that is not known.
    """
    found = {"seconds": float(record["seconds"])}
    if "peak_memory_mb" in record:
        found["peak_memory_mb"] = float(record["peak_memory_mb"])
    if steps:
        found["seconds_per_step"] = found["seconds"] / steps
    return found
