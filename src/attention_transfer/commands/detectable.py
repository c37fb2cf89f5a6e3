"""Which differences a study can find, said and written down before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attention_transfer.config import Study
from attention_transfer.files import write_text
from attention_transfer.layout import Layout
from attention_transfer.reporting import detectable, records, tables

FOLDER = Path("reports") / "plans"


def show(study: Study, experiments: Mapping[str, Study], pilot: Study, *, as_json: bool = False) -> None:
    """Prints the table, and writes it to reports/plans/<study>.md.

    Args:
        pilot: a study that has run, whose spread over seeds is taken.

    Raises:
        StudyError: a record of the pilot is missing or damaged.
    """
    found = detectable.table(study, experiments, records.load(pilot, Layout.of(pilot).metrics))
    text = f"{found.caption}\n\n{tables.markdown(found)}\n"
    path = FOLDER / f"{study.name}.md"
    write_text(path, text)
    print(found.frame.to_json(orient="records") if as_json else f"{text}\nWritten to {path}")
