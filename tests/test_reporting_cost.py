"""Numbers handed over, counted by hand; times and memory of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import synthetic_records as synthetic
import tiny_study

from attention_transfer.config import Study
from attention_transfer.reporting import cost
from attention_transfer.reporting.records import load


def study_of(method: str, **changes: Any) -> Study:
    """A tiny study whose run of that name has these params; its teacher's shape is tiny_study's."""
    study = tiny_study.make_study(method, {})
    run = study.runs["run"].model_copy(update=changes)
    return study.model_copy(update={"runs": {"run": run}})


@pytest.mark.parametrize(
    ("method", "changes", "content"),
    [
        ("copy", {"layers": (0, 1)}, "maps"),
        ("copy", {"layers": (0, 1)}, "queries_and_keys"),
        ("distill", {"layers": (1,)}, "maps"),
        ("distill", {"layers": (1,), "heads": (0,)}, "queries_and_keys"),
        ("copy", {"layers": (0, 1), "transfer": "query"}, "maps"),
    ],
)
def test_attention_counts_each_number_of_each_head_once(
    method: str, changes: dict[str, Any], content: str
) -> None:
    study = study_of(method, **changes)
    study = study.model_copy(update={"attention": study.attention.model_copy(update={"content": content})})
    architecture = study.teachers[study.runs["run"].teacher].architecture
    tokens = (study.data.image_size // architecture.patch_size) ** 2 + 1
    heads = len(changes["heads"]) if "heads" in changes else architecture.heads
    width = architecture.width // architecture.heads
    of_a_head = (
        tokens * width if "transfer" in changes else tokens**2 if content == "maps" else 2 * tokens * width
    )
    assert cost.handed_over(study, "run") == len(changes["layers"]) * heads * of_a_head


@pytest.mark.parametrize("method", ["scratch", "finetune", "linear_probe"])
def test_nothing_is_handed_over_without_transfer(method: str) -> None:
    assert cost.handed_over(study_of(method), "run") == 0


def test_features_are_whole_tokens_and_logits_one_a_class() -> None:
    study = study_of("distill_features")
    architecture = study.teachers[study.runs["run"].teacher].architecture
    tokens = (study.data.image_size // architecture.patch_size) ** 2 + 1
    layers = len(study.layers("run"))
    assert layers > 0
    assert cost.handed_over(study, "run") == layers * tokens * architecture.width
    assert cost.handed_over(study_of("distill_logits"), "run") is None


def test_the_table_has_time_and_memory_of_every_run(tmp_path: Path) -> None:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    records = load(study, metrics)
    found = cost.table(records)
    assert list(found.frame["run"]) == list(study.runs)
    seconds = [run["seconds"] for run in records.provenance if run.get("run") == "copy"]
    steps = records.training[records.training.run == "copy"].iloc[0]["steps"]
    of_copy = found.frame.set_index("run").loc["copy"]
    assert of_copy["step_ms"] == pytest.approx(1000 * sorted(seconds)[1] / steps)
    assert found.frame["relative_step"].iloc[0] == 1
    assert found.shown.shape[0] == len(study.runs)
