"""Chooses among a search's runs by validation accuracy, and writes the table of that choice.

Not a stage of the graph: `make tune` runs it when the runs of presets/tune.yaml are trained. It reads
the records of training alone, so that no test image can have a say.
"""

import argparse
import math
import sys
from pathlib import Path

import pandas as pd

from attention_transfer import config, run_record
from attention_transfer.errors import StudyError
from attention_transfer.files import read_json, write_text
from attention_transfer.layout import Layout


def table(study: config.Study) -> pd.DataFrame:
    """One row a candidate: its method, what was varied, its mean accuracy, and whether it is chosen."""
    layout = Layout.of(study)
    rows = []
    for name, run in study.runs.items():
        accuracies = [_validation_accuracy(layout, name, seed) for seed in study.seeds]
        rows.append(
            {
                "method": run.method,
                "transfer": run.transfer if run.method in ("copy", "distill") else None,
                "learning_rate": run.learning_rate,
                "weight": _weight(run),
                "epochs": run.epochs,
                "seeds": len(accuracies),
                "validation_accuracy": round(sum(accuracies) / len(accuracies), 6),
                "lowest": min(accuracies),
                "highest": max(accuracies),
            }
        )
    frame = pd.DataFrame(rows)
    best = frame.groupby(["method", "transfer"], dropna=False)["validation_accuracy"].transform("idxmax")
    frame["chosen"] = frame.index == best
    return frame


def _standard_error(choice: pd.DataFrame, study: config.Study) -> float:
    """Of the lowest chosen accuracy, from the number of images alone."""
    share = float(choice.loc[choice["chosen"], "validation_accuracy"].min())
    return math.sqrt(share * (1 - share) / study.data.validation)


def _weight(run: config.Run) -> float | None:
    """The weight of the run's transfer loss beside the task's, None where it has none."""
    loss = run.attention_loss or run.feature_loss or run.logit_loss
    return loss.weight if loss else None


def _validation_accuracy(layout: Layout, run: str, seed: int) -> float:
    folder, stage = layout.record("train", run, seed), f"train@{run}-{seed}"
    run_record.read(folder, made_by=stage)
    accuracy: float = read_json(folder / "metrics.json", made_by=stage)["validation_accuracy"]
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="the search, such as presets/tune.yaml")
    arguments = parser.parse_args()
    try:
        study = config.load(arguments.params)
        choice = table(study)
        folder = Layout.of(study).report / "tables"
        write_text(folder / "choice.csv", choice.to_csv(index=False))
        shown = choice.astype(object).assign(chosen=choice["chosen"].map({True: "yes", False: ""}))
        shown = shown.where(choice.notna(), "")
        text = (
            f"Accuracy on the {study.data.validation} validation images, mean over seeds "
            f"{', '.join(map(str, study.seeds))}; the best of each method is what params.yaml and "
            "presets/full use. So many images "
            f"have a standard error of {100 * _standard_error(choice, study):.1f} points: rows closer than that are "
            "equal as far as they tell.\n\n"
            f"{shown.to_markdown(index=False)}\n"
        )
        write_text(folder / "choice.md", text)
        print(text)
    except StudyError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
