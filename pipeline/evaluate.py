"""Computes every metric from the stored predictions: scores, detection, ensembles, comparisons, calibration."""

from attention_transfer.stage import Stage, run_script

from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from attention_transfer.data import published, shifted
from attention_transfer.evaluation import calibration, ensembles, metrics, ood, predictions, statistics
from attention_transfer.evaluation.predictions import Predictions
from attention_transfer.files import fingerprint, sha256, write_text


class Store:
    """Predictions by run, seed and set, each read once."""

    def __init__(self, this: Stage) -> None:
        self.this = this
        self.read: dict[tuple[str, int, str], Predictions] = {}

    def __call__(self, run: str, seed: int, which: str) -> Predictions:
        key = (run, seed, which)
        if key not in self.read:
            path = self.this.layout.predictions(run, seed) / f"{which}.safetensors"
            self.read[key] = predictions.load(path, made_by=f"predict@{run}-{seed}")
        return self.read[key]


def main(this: Stage) -> None:
    study, layout = this.study, this.layout
    store = Store(this)

    def work() -> dict[str, Any]:
        tables = {
            "scores": scores(this, store),
            "ood": detection(this, store),
            "ensembles": combinations(this, store),
            "comparisons": comparisons(this, store),
            "calibration": temperatures(this, store),
        }
        for name, table in tables.items():
            write_text(this.record / f"{name}.csv", table.to_csv(index=False, float_format="%.6f"))
        clean = tables["scores"]
        for which in ("test", "validation"):
            rows = clean[clean["set"] == which]
            if len(rows):
                means = rows.groupby("run", sort=False)["accuracy"].mean()
                return {f"{which}_accuracy.{run}": round(float(value), 6) for run, value in means.items()}
        return {}

    this.run(
        params={
            "evaluation": study.evaluation.model_dump(mode="json"),
            "ensembles": {name: list(e.members) for name, e in study.ensembles.items()},
            "seeds": list(study.seeds),
        },
        inputs={
            "predictions": fingerprint(
                {
                    f"{run}-{seed}": sorted(
                        (path.name, sha256(path))
                        for path in layout.predictions(run, seed).glob("*.safetensors")
                    )
                    for run, seed in study.grid
                }
            )
        },
        work=work,
        live=True,
    )


def sets(this: Stage) -> list[tuple[str, str, str, int]]:
    """File name, set, shift and severity of every labelled set of the task."""
    evaluation = this.study.evaluation
    own = [(name, name, "", 0) for name in ("validation", "test") if name in evaluation.sets]
    made = shifted.made(this.layout.shifts, evaluation, this.study.data)
    return (
        own
        + [
            (name, "shifts", what["shift"], what["severity"])
            for name, what in made.items()
            if "shift" in what
        ]
        + [
            (name, "published", published.condition(what), what.get("severity", 0))
            for name, what in made.items()
            if "published" in what
        ]
    )


def scores(this: Stage, store: Store) -> pd.DataFrame:
    """One row a run, seed and set.

    The set `unshifted` holds the very test images that are shifted, as they are: a drop under a shift is
    a difference on the same images.
    """
    evaluation = this.study.evaluation
    rows: list[dict[str, Any]] = []

    def add(
        run: str, seed: int, found: Predictions, *, which: str, shift: str = "", severity: int = 0
    ) -> None:
        score = metrics.score(found.judged, found.labels, bins=evaluation.calibration_bins)
        rows.append(
            {"run": run, "seed": seed, "set": which, "shift": shift, "severity": severity}
            | {"examples": len(found.labels)}
            | {key: score.get(key) for key in ("accuracy", "top5", "nll", "brier", "ece")}
        )

    for run, seed in tqdm(this.study.grid, desc="scores", unit="run", mininterval=5, delay=2):
        for file, which, shift, severity in sets(this):
            add(run, seed, store(run, seed, file), which=which, shift=shift, severity=severity)
        if {"test", "shifts"} <= set(evaluation.sets):
            chosen = store(run, seed, shifted.name(evaluation.shifts[0], evaluation.severities[0])).examples
            clean = store(run, seed, "test")
            same = Predictions(clean.logits[chosen], clean.labels[chosen], chosen)
            add(run, seed, same, which="unshifted")
    return pd.DataFrame(rows)


def detection(this: Stage, store: Store) -> pd.DataFrame:
    """How well the confidence tells the test images from another data set's."""
    columns = ["run", "seed", "set", "score", "auroc", "fpr95"]
    if not {"test", shifted.DIGITS} <= set(this.study.evaluation.sets):
        return pd.DataFrame(columns=columns)
    rows = []
    for run, seed in this.study.grid:
        inside, outside = store(run, seed, "test").logits, store(run, seed, shifted.DIGITS).logits
        for score in ("max_probability", "energy"):
            found = ood.detect(inside, outside, score)
            rows.append({"run": run, "seed": seed, "set": shifted.DIGITS, "score": score} | found)
    return pd.DataFrame(rows, columns=columns)


def combinations(this: Stage, store: Store) -> pd.DataFrame:
    """Ensembles of two members: of the same seed, or of two seeds of one run."""
    study = this.study
    rows = []
    for name, ensemble in study.ensembles.items():
        first, second = ensemble.members
        for index, seed in enumerate(study.seeds):
            other = study.seeds[(index + 1) % len(study.seeds)] if first == second else seed
            for which in ("validation", "test"):
                if which in study.evaluation.sets:
                    a, b = store(first, seed, which), store(second, other, which)
                    found = ensembles.compare_members(a.logits, b.logits, a.labels)
                    rows.append(
                        {"ensemble": name, "first": first, "first_seed": seed, "second": second}
                        | {"second_seed": other, "set": which}
                        | found
                    )
    return pd.DataFrame(rows)


def temperatures(this: Stage, store: Store) -> pd.DataFrame:
    """Calibration on the test set before and after temperature scaling, the temperature fitted on validation images.

    A run that has no temperature, being right on all of them or no better than chance, has empty cells.
    """
    columns = ["run", "seed", "temperature", "nll", "ece", "nll_scaled", "ece_scaled"]
    evaluation = this.study.evaluation
    if not {"validation", "test"} <= set(evaluation.sets):
        return pd.DataFrame(columns=columns)
    rows = []
    for run, seed in this.study.grid:
        chosen_on, test = store(run, seed, "validation"), store(run, seed, "test")
        before = metrics.score(test.logits, test.labels, bins=evaluation.calibration_bins)
        row = {"run": run, "seed": seed, "nll": before["nll"], "ece": before["ece"]}
        try:
            temperature = calibration.fit_temperature(chosen_on.logits, chosen_on.labels)
        except calibration.NoTemperatureError as error:
            print(f"{run}, seed {seed}: {error}")
        else:
            scaled = calibration.rescaled(test.logits, temperature)
            after = metrics.score(scaled, test.labels, bins=evaluation.calibration_bins)
            row |= {"temperature": temperature, "nll_scaled": after["nll"], "ece_scaled": after["ece"]}
        rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def comparisons(this: Stage, store: Store) -> pd.DataFrame:
    """Differences of accuracy between every two runs, on the test set and on each shift over severities."""
    study, evaluation = this.study, this.study.evaluation
    groups: dict[tuple[str, str], list[str]] = {}
    for file, which, shift, _ in sets(this):
        groups.setdefault((which, shift), []).append(file)
    runs = list(study.runs)
    rows = []
    for (which, shift), files in groups.items():
        correct = {
            run: np.stack(
                [
                    np.concatenate([store(run, seed, file).correct.numpy() for file in files])
                    for seed in study.seeds
                ]
            )
            for run in runs
        }
        for index, second in enumerate(runs):
            for first in runs[index + 1 :]:
                interval = statistics.hierarchical_bootstrap(
                    correct[first],
                    correct[second],
                    resamples=evaluation.bootstrap,
                    confidence=evaluation.confidence,
                    seed=study.data.seed,
                )
                rows.append(
                    {"first": first, "second": second, "set": which, "shift": shift}
                    | {"difference": interval.mean, "low": interval.low, "high": interval.high}
                    | {"seeds": len(study.seeds), "examples": correct[first].shape[1]}
                )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run_script("evaluate", main, __file__)
