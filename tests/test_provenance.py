"""Which code counts for a stage: found from the sources, and compared with Python's own module finder."""

from __future__ import annotations

import importlib.util
import modulefinder
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from attention_transfer import provenance

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "pipeline").glob("*.py"))
assert SCRIPTS


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package and of the stages, to edit."""
    for folder in ("src/attention_transfer", "pipeline"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def copied(house: Path) -> ModuleType:
    """The copy's provenance module, fresh."""
    path = house / "src/attention_transfer/provenance.py"
    specification = importlib.util.spec_from_file_location("provenance_of_a_copy", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def names(house: Path, text: str) -> set[str]:
    """What `imported_files` finds for a script, relative to the package."""
    script = house / "script.py"
    script.write_text(text, encoding="utf-8")
    module = copied(house)
    return {str(path.relative_to(module.PACKAGE)) for path in module.imported_files(script)}


VIEWS = {"data/__init__.py", "data/views.py"}


@pytest.mark.parametrize(
    "text",
    [
        "from attention_transfer.data import views",
        "from attention_transfer.data import views as v",
        "import attention_transfer.data.views",
        "from attention_transfer.data.views import render",
        "def f():\n    def g():\n        from attention_transfer.data import views",
        "class A:\n    import attention_transfer.data.views as v",
        "if False:\n    from attention_transfer.data.views import (\n        CLEAN,\n        render,\n    )",
        "try:\n    pass\nexcept ImportError:\n    from attention_transfer.data import views",
    ],
)
def test_every_form_of_import_is_found(text: str, house: Path) -> None:
    assert names(house, text) == VIEWS


def test_imports_of_imports_are_found(house: Path) -> None:
    """data.shifted imports data.shifts inside a function, and that imports data.corruptions."""
    found = names(house, "from attention_transfer.data.shifted import load")
    assert found >= {"data/shifted.py", "data/shifts.py", "data/corruptions.py", "data/images.py"}


def test_neutral_files_do_not_count_and_lead_nowhere(house: Path) -> None:
    text = "from attention_transfer import config, errors, files, layout, provenance, stage, tracking\n"
    assert names(house, f"{text}import attention_transfer.tracking.sync, numpy\n") == set()


def test_circles_end(house: Path) -> None:
    package = house / "src/attention_transfer"
    (package / "first.py").write_text("from attention_transfer import second\n")
    (package / "second.py").write_text("def f():\n    from attention_transfer import first\n")
    assert names(house, "import attention_transfer.first") == {"first.py", "second.py"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_same_files_as_pythons_module_finder(script: Path) -> None:
    """The standard library's finder reads bytecode, not the source's syntax tree."""
    finder = modulefinder.ModuleFinder(path=[str(ROOT / "src")])
    finder.run_script(str(script))
    package = provenance.PACKAGE.resolve()
    origins = {getattr(module, "__file__", None) for module in finder.modules.values()}
    files = {Path(origin).resolve() for origin in origins if origin}
    found = {path for path in files if package in path.parents}
    counted = {path for path in found - provenance.NEUTRAL if package / "tracking" not in path.parents}
    assert set(provenance.imported_files(script)) == counted
    assert package / "config.py" in found


@pytest.mark.parametrize("name", sorted(path.name for path in provenance.NEUTRAL))
def test_neutral_files_exist(name: str) -> None:
    assert (provenance.PACKAGE / name).is_file()


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\nEDITED = 1\n")


@pytest.mark.parametrize(
    ("script", "used"),
    [
        ("train", "src/attention_transfer/transfer/losses.py"),
        ("train", "src/attention_transfer/data/views.py"),
        ("train", "src/attention_transfer/training/__init__.py"),
        ("train", "pipeline/train.py"),
        ("shifts", "src/attention_transfer/data/corruptions.py"),  # imported inside a function of an import
        ("report", "src/attention_transfer/reporting/claims.py"),
    ],
)
def test_an_edit_to_used_code_changes_the_fingerprint(script: str, used: str, house: Path) -> None:
    path = house / "pipeline" / f"{script}.py"
    before = copied(house).code_fingerprint(path)
    assert copied(house).code_fingerprint(path) == before
    edit(house / used)
    assert copied(house).code_fingerprint(path) != before


@pytest.mark.parametrize("script", ["train", "shifts", "report"])
def test_an_edit_to_other_code_does_not(script: str, house: Path) -> None:
    path = house / "pipeline" / f"{script}.py"
    module = copied(house)
    before = module.code_fingerprint(path)
    used = {path, *module.imported_files(path)}
    others = [other for other in house.rglob("*.py") if other not in used]
    assert {"config.py", "stage.py", "runs.py", "__main__.py", "evaluate.py"} <= {one.name for one in others}
    for other in others:
        edit(other)
    assert copied(house).code_fingerprint(path) == before


def test_the_fingerprint_does_not_depend_on_the_place(house: Path) -> None:
    script = "pipeline/train.py"
    assert copied(house).code_fingerprint(house / script) == provenance.code_fingerprint(ROOT / script)


# The revision


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A repository with code and records in it, as the working folder; gives git."""
    monkeypatch.chdir(tmp_path)
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)

    git("init")
    for name in ("src/a.py", "metrics/a.json", "params.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("1\n")
    git("add", ".")
    git("commit", "-m", "first")
    return git


def test_a_revision_is_dirty_when_code_or_params_differ(repository: Callable[..., None]) -> None:
    clean = provenance.git_state()
    assert len(clean["git_revision"]) == 40
    assert clean["git_dirty"] is False
    Path("metrics/a.json").write_text("2\n")
    Path("src/new.py").write_text("2\n")
    assert provenance.git_state() == clean
    for name in ("src/a.py", "params.yaml"):
        Path(name).write_text("2\n")
        assert provenance.git_state() == {**clean, "git_dirty": True}
        repository("checkout", name)
        assert provenance.git_state() == clean


def test_there_is_no_revision_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_state() == {"git_revision": None, "git_dirty": None}


def test_there_is_no_revision_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() == {"git_revision": None, "git_dirty": None}
    assert provenance.last_changes(Path(provenance.__file__))[:2] == [None, None]


def test_the_commit_that_last_changed_each_line(
    repository: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = Path("rules.jsonl")
    rules.write_text("one\ntwo\n")
    repository("add", "-A")
    repository("commit", "-m", "first")
    first = provenance.git_state()["git_revision"]
    rules.write_text("one\ntwo, changed\nthree\n")
    repository("commit", "-am", "second")
    second = provenance.git_state()["git_revision"]
    assert provenance.last_changes(rules) == [first, second, second]
    rules.write_text("one\ntwo, changed\nthree, not committed\n")
    assert provenance.last_changes(rules) == [first, second, None]
    repository("checkout", "--", ".")
    shallow = tmp_path / "shallow"
    repository("clone", "--depth", "1", f"file://{Path.cwd()}", str(shallow))
    assert provenance.last_changes(rules) == [first, second, second]
    monkeypatch.chdir(shallow)  # what came before its only commit is not known
    assert provenance.last_changes(rules) == [None, None, None]
