"""Records of a study that never ran, with numbers that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attention_transfer import run_record
from attention_transfer.config import Study
from attention_transfer.files import write_sealed, xxh3

ACCURACY = {"scratch": 0.80, "finetune": 0.86, "copy": 0.85, "distill": 0.86}
METHODS = ("scratch", "finetune", "copy", "distill", "linear_probe")
SPREAD = 0.001
DEPTH = 6


def study(
    runs: Sequence[str] = ("scratch", "finetune", "copy", "distill"),
    seeds: Sequence[int] = (0, 1, 2),
    ensembles: Mapping[str, tuple[str, str]] | None = None,
    **changes: Any,
) -> Study:
    """A study whose run names begin with their method; keys of `changes` are dotted with `__`."""
    if ensembles is None:
        ensembles = {
            "finetune_distill": ("finetune", "distill"),
            "finetune_finetune": ("finetune", "finetune"),
            "distill_distill": ("distill", "distill"),
        }
    architecture = {"patch_size": 4, "width": 48, "depth": DEPTH, "heads": 3, "mlp_ratio": 4.0}
    values: dict[str, Any] = {
        "name": "synthetic",
        "seeds": tuple(seeds),
        "experiments": (),
        "data": {
            "source": "fashion-mnist",
            "folder": "data",
            "train_split": "train",
            "test_split": "test",
            "resize": 28,
            "image_size": 28,
            "channels": 1,
            "labelled": 1000,
            "validation": 500,
            "seed": 0,
        },
        "views": {
            "per_image": 2,
            "crop_scale": (0.5, 1.0),
            "crop_ratio": (0.75, 1.33),
            "flip": 0.5,
            "erase": 0.1,
            "mixup": 0.0,
            "cutmix": 0.0,
        },
        "attention": {"source": "cache", "content": "queries_and_keys", "dtype": "float16", "budget_gb": 1.0},
        "training": {"precision": "float32", "clip_norm": None, "validate_every": 5, "curve_images": 50},
        "teachers": {"untrained": {"kind": "untrained", "architecture": architecture, "seed": 0}},
        "runs": {name: _run(name) for name in runs},
        "evaluation": {
            "sets": ("validation", "test", "shifts", "digits"),
            "shifts": ("gaussian_noise", "fog", "rotate"),
            "severities": (1, 3, 5),
            "shift_images": 500,
            "published": {},
            "calibration_bins": 15,
            "confidence": 0.95,
            "bootstrap": 1000,
        },
        "finetuned_teachers": {},
        "ensembles": {name: {"members": members} for name, members in ensembles.items()},
        "report": {
            "scratch": "scratch",
            "finetune": "finetune",
            "copied": "copy",
            "distilled": "distill",
            "attention_images": 3,
            "equivalence_margin": 0.01,
        },
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return Study.model_validate(values)


def _run(name: str) -> dict[str, Any]:
    method = next(method for method in METHODS if name.startswith(method))
    values: dict[str, Any] = {
        "method": method,
        "teacher": "untrained",
        "learning_rate": 0.001,
        "epochs": 20,
        "warmup_epochs": 2.0,
        "batch_size": 100,
    }
    if method in ("copy", "distill"):
        values["layers"] = "all"
    if method == "distill":
        values["attention_loss"] = {"weight": 3.0, "reduction": "sum"}
    return values


@dataclass
class Numbers:
    """What the records say; accuracies are per run, or per run and seed (then without spread)."""

    accuracy: dict[str, float | Sequence[float]] = field(default_factory=dict)
    """Means that replace those of ACCURACY; runs that neither names get 0.83."""
    drop: dict[str, float] = field(default_factory=dict)
    """Loss of accuracy under shift, by run; 0.1 unless given."""
    ensemble: dict[str, float] = field(default_factory=dict)
    """Gain over the better member, by ensemble; 0.01 unless given."""
    version: str = "2.0"
    revision: str = "0123abc"


def write(root: Path, study: Study, numbers: Numbers | None = None) -> tuple[Path, Path]:
    """Writes all records of `study` below `root`; returns the folders of metrics and of artifacts."""
    numbers = numbers or Numbers()
    metrics, artifacts = root / "metrics", root / "artifacts"
    accuracy = {
        (run, seed): _accuracy(numbers, run, position)
        for run in study.runs
        for position, seed in enumerate(study.seeds)
    }
    for run, seed in study.grid:
        _write_training(
            metrics / "train" / run / str(seed),
            study,
            run,
            seed,
            accuracy=accuracy[run, seed],
            numbers=numbers,
        )
    for position, teacher in enumerate(study.teachers):
        _write_probe(metrics / "probe" / teacher, position, numbers)
    (metrics / "evaluate").mkdir(exist_ok=True)
    _write_scores(metrics / "evaluate", study, numbers, accuracy)
    _write_ensembles(metrics / "evaluate", study, numbers, accuracy)
    _write_similarity(metrics / "similarity", study, numbers)
    _write_images(artifacts, study)
    for stage, outputs in {
        "splits": [],
        "evaluate": sorted((metrics / "evaluate").glob("*.csv")),
        "maps": [artifacts / "maps" / "maps.npz"],
        "shifts": [artifacts / "shifts" / "contact_sheet.npz"],
    }.items():
        (metrics / stage).mkdir(exist_ok=True)
        run_record.write(metrics / stage, _record(stage, {"data": study.data.model_dump()}, numbers), outputs)
    return metrics, artifacts


def overwrite(path: Path, table: pd.DataFrame) -> None:
    """Another table in a stage's record, as if the stage had written it."""
    table.to_csv(path, index=False)
    (values := json.loads((path.parent / "run.json").read_text())).pop("digest")
    values["outputs"][path.name] = xxh3(path)
    write_sealed(path.parent / "run.json", values)


def _accuracy(numbers: Numbers, run: str, position: int) -> float:
    given = numbers.accuracy.get(run, ACCURACY.get(run, 0.83))
    if isinstance(given, float):
        # not the same pattern for all runs: differences must have a spread too
        wobble = np.random.default_rng(sum(map(ord, run))).normal(size=16)[position]
        return given + SPREAD * float(wobble)
    return float(given[position])


def _record(stage: str, params: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
    return {
        "stage": stage,
        "study": "synthetic",
        "fingerprint": "0" * 16,
        "params": json.loads(json.dumps(params)),
        "git_revision": numbers.revision,
        "git_dirty": False,
        "versions": {"python": "3.11.9", "torch": numbers.version},
        "machine": {"device": "cpu", "cores": 2},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 12.5,
        "peak_memory_mb": 512.0,
    }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _write_probe(folder: Path, position: int, numbers: Numbers) -> None:
    found = {
        "knn_accuracy": 0.5,
        "logistic_regression_accuracy": 0.6 + position / 10,
        "effective_rank": 12.34,
    }
    _write_json(folder / "metrics.json", found)
    run_record.write(folder, _record("probe", {}, numbers), [folder / "metrics.json"])


def _write_similarity(folder: Path, study: Study, numbers: Numbers) -> None:
    """A model's CKA with its teacher falls from 1 by a tenth a layer, that with the fine-tuned one is half of it."""
    rows: list[dict[str, Any]] = [
        {"run": run, "seed": seed, "reference": reference, "layer": layer}
        | {"cka": (1 - layer / 10) * share, "divergence": 0.1 + seed / 100, "matched_divergence": 0.05}
        | {"distance": 9.0, "entropy": 2.0, "on_objects": 1.5 if run == "copy" else 1.1 + seed / 100}
        for run, seed in study.grid
        for reference, share in (("teacher", 1.0), ("finetune", 0.8 if run == "finetune" else 0.5))
        for layer in range(DEPTH)
    ]
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "layers.csv", index=False)
    pd.DataFrame(
        [
            {key: row[key] for key in ("run", "seed", "reference", "layer")}
            | {"reference_layer": other, "cka": row["cka"] - abs(other - row["layer"]) / 50}
            for row in rows
            for other in range(DEPTH)
        ]
    ).to_csv(folder / "cka.csv", index=False)
    run_record.write(folder, _record("similarity", {}, numbers), [folder / "layers.csv", folder / "cka.csv"])


def write_similarity_of(metrics: Path, experiment: str, run: str) -> pd.DataFrame:
    """Of an experiment's run, as if it were the copied one of the main comparison; gives the rows."""
    source, folder = metrics / "similarity", metrics / "similarity" / experiment
    frame = pd.read_csv(source / "layers.csv")
    frame = frame[(frame["run"] == "copy") & (frame["reference"] == "teacher")].assign(run=run)
    folder.mkdir(exist_ok=True)
    frame.to_csv(folder / "layers.csv", index=False)
    record = json.loads((source / "run.json").read_text())
    kept = {key: value for key, value in record.items() if key not in ("digest", "outputs")}
    run_record.write(folder, kept, [folder / "layers.csv"])
    return frame


def write_experiment(
    study: Study, accuracy: Mapping[str, Mapping[int, float]], metrics: Path, name: str
) -> Study:
    """Writes the scores of an experiment with these accuracies, and gives its study."""
    folder = metrics / "evaluate" / name
    folder.mkdir()
    rows = [
        {"run": run, "seed": seed, "set": which, "accuracy": value + (which == "validation")}
        for run, values in accuracy.items()
        for seed, value in values.items()
        for which in ("validation", "test")
    ]
    pd.DataFrame(rows).to_csv(folder / "scores.csv", index=False)
    record = json.loads((metrics / "evaluate" / "run.json").read_text())
    kept = {key: value for key, value in record.items() if key not in ("digest", "outputs")}
    run_record.write(folder, kept, [folder / "scores.csv"])
    write_similarity_of(metrics, name, "copy_query")
    runs = {run: study.runs["copy"].model_copy(update={"transfer": "query"}) for run in accuracy}
    seeds = tuple(next(iter(accuracy.values())))
    return study.model_copy(
        update={"name": f"synthetic/{name}", "runs": runs, "seeds": seeds, "report": None}
    )


def _write_training(
    folder: Path, study: Study, run: str, seed: int, *, accuracy: float, numbers: Numbers
) -> None:
    recipe = study.runs[run]
    record = _record("train", {"runs": {run: recipe.model_dump()}}, numbers) | {"run": run, "seed": seed}
    _write_json(
        folder / "metrics.json",
        {
            "validation_accuracy": accuracy - 0.002,
            "validation_loss": 0.5,
            "epochs": recipe.epochs,
            "steps": 10 * recipe.epochs,
            "parameters": 123456,
            "train_loss": 0.7,
        },
    )
    epochs = np.arange(1, recipe.epochs + 1)
    progress = 1 - np.exp(-epochs / (0.25 * recipe.epochs))
    noise = np.random.default_rng(seed).normal(size=(3, len(epochs)))
    validated = (epochs % study.training.validate_every == 0) | (epochs == recipe.epochs)
    pd.DataFrame(
        {
            "epoch": epochs,
            "step": 10 * epochs,
            "task_loss": 2.3 - 1.5 * progress * accuracy + 0.02 * noise[0],
            "attention_loss": 10 - 4 * progress + 0.05 * noise[1] if recipe.method == "distill" else np.nan,
            "learning_rate": 0.001 * (1 - epochs / recipe.epochs),
            "validation_accuracy": np.where(validated, accuracy * progress + 0.003 * noise[2], np.nan),
        }
    ).to_csv(folder / "curve.csv", index=False)
    run_record.write(folder, record, [folder / "metrics.json", folder / "curve.csv"])


def _write_scores(
    folder: Path, study: Study, numbers: Numbers, accuracy: Mapping[tuple[str, int], float]
) -> None:
    rows, ood = [], []
    evaluation = study.evaluation
    for (run, seed), clean in accuracy.items():
        for image_set in ("validation", "test", "unshifted"):
            rows.append((run, seed, image_set, "", 0, 2000, clean))
        wobble = 0.003 * np.random.default_rng([seed, *map(ord, run)]).normal()
        for shift in evaluation.shifts:
            for severity in evaluation.severities:
                # in proportion to severity; the drops average to the given one
                share = severity / np.mean(evaluation.severities)
                drop = numbers.drop.get(run, 0.1) * share + wobble
                rows.append((run, seed, "shifts", shift, severity, 500, clean - drop))
        for score in ("max_probability", "energy"):
            ood.append((run, seed, "digits", score, 0.9 + 0.01 * seed, 0.3 - 0.01 * seed))
    columns = ["run", "seed", "set", "shift", "severity", "examples", "accuracy"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["top5"] = 0.99
    frame["nll"] = 1.6 * (1 - frame["accuracy"])
    frame["brier"] = 1.2 * (1 - frame["accuracy"])
    frame["ece"] = 0.1 * (1 - frame["accuracy"])
    frame.to_csv(folder / "scores.csv", index=False)
    pd.DataFrame(ood, columns=["run", "seed", "set", "score", "auroc", "fpr95"]).to_csv(
        folder / "ood.csv", index=False
    )
    pairs = [(run, "finetune") for run in study.runs if run != "finetune"]
    pd.DataFrame(
        [
            (first, second, *where, -0.01, -0.02, 0.001, len(study.seeds), 2000)
            for first, second in pairs
            for where in (("test", ""), *(("shifts", shift) for shift in evaluation.shifts))
        ],
        columns=["first", "second", "set", "shift", "difference", "low", "high", "seeds", "examples"],
    ).to_csv(folder / "comparisons.csv", index=False)
    pd.DataFrame(
        [(run, seed, 1.25, 0.5, 0.04, 0.45, 0.01) for run, seed in study.grid],
        columns=["run", "seed", "temperature", "nll", "ece", "nll_scaled", "ece_scaled"],
    ).to_csv(folder / "calibration.csv", index=False)


def _write_ensembles(
    folder: Path, study: Study, numbers: Numbers, accuracy: Mapping[tuple[str, int], float]
) -> None:
    rows = []
    for name, ensemble in study.ensembles.items():
        first, second = ensemble.members
        for position, seed in enumerate(study.seeds):
            following = study.seeds[(position + 1) % len(study.seeds)]
            other = following if first == second else seed
            members = accuracy[first, seed], accuracy[second, other]
            gain = numbers.ensemble.get(name, 0.01) + SPREAD * np.cos(position + len(name))
            rows.append(
                (name, first, seed, second, other, "test", max(members) + gain, *members, gain, 0.1, 0.6)
            )
    columns = [
        *("ensemble", "first", "first_seed", "second", "second_seed", "set", "accuracy"),
        *("first_accuracy", "second_accuracy", "gain", "disagreement", "error_consistency"),
    ]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "ensembles.csv", index=False)


def _write_images(artifacts: Path, study: Study) -> None:
    generator = np.random.default_rng(0)
    side, images, heads, grid = study.data.image_size, 4, 3, 7
    rows, columns = np.mgrid[:side, :side] / side
    pictures = np.stack(
        [255 * np.exp(-((rows - 0.5) ** 2 + (columns - k / 5) ** 2) * 9) for k in range(1, 5)]
    )
    pictures = np.repeat(pictures[:, None], study.data.channels, axis=1).astype(np.uint8)
    maps = {}
    for name in ("teacher", "finetune", "scratch", "distill"):
        logits = generator.normal(size=(images, 3, heads, 1 + grid**2, 1 + grid**2))
        maps[f"maps_{name}"] = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)
    (artifacts / "maps").mkdir(parents=True, exist_ok=True)
    np.savez(
        artifacts / "maps" / "maps.npz",
        images=pictures,
        classes=np.array(["Bag", "Coat", "T-shirt/top", "<b>Boot</b>"]),
        layers=np.array([0, DEPTH // 2, DEPTH - 1]),
        names=np.array(["teacher", "finetune", "scratch", "distill"]),
        **maps,
    )
    shifts, severities = study.evaluation.shifts, study.evaluation.severities
    (artifacts / "shifts").mkdir(parents=True, exist_ok=True)
    noise = generator.integers(0, 60, size=(len(shifts), len(severities), study.data.channels, side, side))
    np.savez(
        artifacts / "shifts" / "contact_sheet.npz",
        sheet=np.clip(pictures[0] + noise, 0, 255).astype(np.uint8),
        names=np.array(shifts),
        severities=np.array(severities),
    )
