"""What the search for learning rates chose is what the studies use."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from attention_transfer import config

ROOT = Path(__file__).parent.parent
CHOICE = pd.read_csv(ROOT / "reports" / "tune" / "tables" / "choice.csv")
CHOSEN = CHOICE[CHOICE["chosen"]]
QUESTIONS_THE_RATE = {"full/layers_rate": 0.0015}  # this experiment asks what another rate would have done


@pytest.mark.parametrize("file", ["params.yaml", "presets/full.yaml"])
def test_each_run_has_the_rate_and_weight_that_were_chosen_for_its_method(file: str) -> None:
    configs = [config.load(ROOT / file), *config.experiments(ROOT / file).values()]
    for study, name, run in [(one, *item) for one in configs for item in one.runs.items()]:
        found = CHOSEN[CHOSEN["method"] == run.method]
        if run.method in config.COPIES_ATTENTION:
            found = found[found["transfer"] == run.transfer]
        (chosen,) = found.to_dict("records")
        loss = run.attention_loss or run.feature_loss or run.logit_loss
        assert run.learning_rate == QUESTIONS_THE_RATE.get(study.name, chosen["learning_rate"]), name
        assert (loss.weight == chosen["weight"]) if loss else math.isnan(chosen["weight"]), name


def test_the_table_is_that_of_the_search() -> None:
    """A row for each of its runs, the best of each method marked."""
    search = config.load(ROOT / "presets" / "tune.yaml")
    assert len(CHOICE) == len(search.runs)
    for (method, transfer), rows in CHOICE.fillna({"transfer": ""}).groupby(["method", "transfer"]):
        assert rows["chosen"].sum() == 1, (method, transfer)
        assert rows.loc[rows["chosen"], "validation_accuracy"].item() == rows["validation_accuracy"].max()
