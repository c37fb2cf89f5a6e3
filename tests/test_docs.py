"""Pages that a program writes from the code are what it would write now."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_keys_is_that_of_the_code() -> None:
    writer = runpy.run_path(str(DOCS / "params.py"))
    assert (DOCS / "params.md").read_text(encoding="utf-8") == writer["page"](), "run: python docs/params.py"


def test_the_page_has_every_key() -> None:
    writer = runpy.run_path(str(DOCS / "params.py"))
    page = writer["page"]()
    for section in (*writer["SECTIONS"], *writer["TEACHERS"]):
        part = page[page.index(writer["table"](section)) :]
        for key in section.model_fields:
            assert f"| `{key}` |" in part
    anchors = {writer["anchor"](line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")}
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links <= anchors | {"decoder"}
