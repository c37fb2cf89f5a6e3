"""Pages that a program writes are what it would write now; the others say what is there."""

import re
import runpy
from pathlib import Path

from attention_transfer.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


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


def test_every_key_is_explained_once() -> None:
    writer = runpy.run_path(str(DOCS / "params.py"))
    cells = [
        line.rstrip("|").split("|")[-1].strip() for line in writer["page"]().splitlines() if "| `" in line
    ]
    assert len(cells) > 150
    assert all(cell.endswith((".", ")")) for cell in cells), [
        cell for cell in cells if not cell.endswith(".")
    ]
    for section, texts in writer["TEXTS"].items():
        assert texts.keys() <= section.model_fields.keys()
        assert not texts.keys() & writer["explanations"](section), "stands in the source already"


def test_the_drawing_is_that_of_its_program() -> None:
    drawn = runpy.run_path(str(DOCS / "drawing.py"))["svg"]()
    assert (DOCS / "method.svg").read_bytes() == drawn, "run: python docs/drawing.py"


def test_every_page_is_in_the_index_and_is_what_it_is_called() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_errors_in_the_questions_are_the_codes() -> None:
    """A message in bold code is one that the code can raise, or the part of one between values."""
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    messages = re.findall(r"\*\*`([^`]+)`\*\*", page.partition("## Questions")[0])
    assert len(messages) > 10
    code = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    code = re.sub(r'"\s+f?"', "", code)
    for message in messages:
        wanted = message.removesuffix(" nan")
        assert wanted in code, message


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_in_pages_exist() -> None:
    known = set(COMMANDS)
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"python -m attention_transfer ([a-z]+)", text)) <= known, page.name
        assert set(re.findall(r"`make ([a-z]+)", text)) <= targets, page.name
