"""`show`: the main table and where the report is; of an experiment, the accuracies of its runs."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import textwrap

from tabulate import tabulate

from attention_transfer import lock_file
from attention_transfer.commands import show_experiment
from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout

HEADING = 16
"""Characters in a line of a table's heading."""


def show(study: Study, params: str, *, as_json: bool) -> None:
    """Prints what the study has found.

    Raises:
        StudyError: it has not been run.
    """
    if study.is_experiment:
        print(json.dumps(show_experiment.accuracies(study)) if as_json else show_experiment.text(study))
        return
    report = Layout.of(study).report
    table, page = report / "tables" / "main.md", report / "report.html"
    if not table.exists():
        graph = lock_file.path(study.name).with_name("dvc.yaml")
        remedy = f"run the study: dvc repro {graph}"
        raise StudyError("has no report yet", where=params, remedy=remedy)
    if as_json:
        with table.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
            rows = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]
        print(json.dumps({"study": study.name, "report": str(page.resolve()), "runs": rows}))
        return
    text = table.read_text(encoding="utf-8")
    if text.partition("\n\n")[2].count("\n|") < 2:
        remedy = f"make it anew: python -m attention_transfer report --params {params}"
        raise StudyError("holds no table", where=str(table), remedy=remedy)
    print(as_text(text))
    print(f"Report:    {page.resolve()}\nMLflow UI: make ui")


def as_text(markdown: str) -> str:
    """A table of the report with its caption, for a terminal: without escapes, and with long headings in several lines.

    Args:
        markdown: the caption, an empty line, and a table with pipes.
    """
    caption, _, table = markdown.partition("\n\n")
    cells = [
        [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.strip().splitlines()
    ]
    headings, rules, *rows = cells
    drawn = tabulate(
        rows,
        [textwrap.fill(heading, HEADING, break_long_words=False) for heading in headings],
        colalign=["right" if rule.endswith(":") else "left" for rule in rules],
        disable_numparse=True,
    )
    return f"{textwrap.fill(caption, shutil.get_terminal_size((100, 0)).columns)}\n\n{drawn}\n"


def _value(text: str) -> str | int | float | None:
    """A cell as a number, if it is one; None for none."""
    try:
        return int(text) if text.isdecimal() else _finite(float(text or "nan"))
    except ValueError:
        return text


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
