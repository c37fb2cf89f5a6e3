"""What each method costs: time and memory of its training, and the numbers that a teacher hands over."""

from __future__ import annotations

import pandas as pd

from attention_transfer.config import Study
from attention_transfer.reporting.records import Records
from attention_transfer.reporting.tables import NONE, Table


def handed_over(study: Study, name: str) -> int | None:
    """Numbers that a run's student gets from its teacher for one image in one step; None: one for each class.

    Of maps as `attention.content` has them: the maps, or the queries and keys that they are made of.
    """
    run, architecture = study.runs[name], study.teachers[study.runs[name].teacher].architecture
    tokens, head_width = architecture.tokens(study.data.image_size), architecture.width // architecture.heads
    if run.method == "distill_logits":
        return None
    if run.method == "distill_features":
        return len(study.layers(name)) * tokens * architecture.width
    heads = sum(map(len, study.heads(name)))  # of all layers
    if run.transfer != "map":
        return heads * tokens * head_width
    return heads * tokens * (tokens if study.attention.content == "maps" else 2 * head_width)


def table(records: Records) -> Table:
    """One row a run; times are of whole stages, start and validation included, by their steps."""
    study = records.study
    handed = {name: handed_over(study, name) for name in study.runs}
    instances = pd.DataFrame([run for run in records.provenance if run["stage"] == "train"])
    rows = []
    for name in study.runs:
        first = records.training[records.training.run == name].iloc[0]
        mine = instances[instances["run"] == name]
        rows.append(
            {
                "run": name,
                "parameters": int(first["parameters"]),
                "numbers_handed_over": handed[name],
                "step_ms": 1000 * float(mine["seconds"].median()) / int(first["steps"]),
                "peak_memory_mb": float(pd.to_numeric(mine["peak_memory_mb"]).max()),
            }
        )
    frame = pd.DataFrame(rows)
    frame["relative_step"] = frame["step_ms"] / frame["step_ms"].iloc[0]
    shown = pd.DataFrame(
        {
            "run": frame["run"],
            "parameters": frame["parameters"].map("{:,}".format),
            "numbers handed over, an image": [_count(numbers) for numbers in handed.values()],
            "time a step, ms": frame["step_ms"].map("{:.1f}".format),
            f"relative to {frame['run'].iloc[0]}": frame["relative_step"].map("{:.2f}".format),
            "peak memory, MB": frame["peak_memory_mb"].map("{:,.0f}".format, na_action="ignore").fillna(NONE),
        }
    )
    caption = (
        "What training costs. Time: of the whole stage, its start and its validation included, over its steps, median "
        "over seeds. Memory: the largest of the process, its code included. Numbers handed over: what the "
        "teacher gives the student for an image in a step; fine-tuning gets the teacher's weights once instead."
    )
    return Table("cost", caption, frame, shown)


def _count(numbers: int | None) -> str:
    return "one a class" if numbers is None else f"{numbers:,}" if numbers else NONE
