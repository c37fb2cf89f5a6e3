"""Damaged outputs of a real DVC stage, with hard links between its cache and the working files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attention_transfer.commands.remake import remake
from attention_transfer.errors import StudyError

pytestmark = pytest.mark.slow  # DVC takes a second to start

MAKE = "from pathlib import Path; Path('folder').mkdir(); "
MAKE += "[Path(name).write_text(name * 20) for name in ('file', 'folder/a', 'folder/b')]"
GRAPH = f"""
stages:
  make:
    cmd: {sys.executable} -c "{MAKE}"
    outs: [file, folder]
"""
INSTANCES = f"""
stages:
  make:
    matrix: {{name: [x, y]}}
    cmd: {sys.executable} -c "from pathlib import Path; Path('${{item.name}}').write_text('${{item.name}}' * 9)"
    outs: ['${{item.name}}']
"""


def dvc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=["hardlink", "copy"])
def repository(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    dvc("init", "--no-scm", "--quiet")
    dvc("config", "cache.type", request.param)
    Path("dvc.yaml").write_text(GRAPH)
    dvc("repro")
    return tmp_path


def truncate(path: Path) -> None:
    os.truncate(path, 3)


def flip(path: Path) -> None:
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("damage", [truncate, flip])
@pytest.mark.parametrize("name", ["file", "folder/a"])
def test_damaged_outputs_are_whole_again_in_both_places(
    name: str, damage: Callable[[Path], None], repository: Path
) -> None:
    damage(Path(name))
    assert remake("dvc.yaml:make") == 0
    for made in ("file", "folder/a", "folder/b"):
        assert Path(made).read_text() == made * 20
        Path(made).unlink()
    dvc("checkout")
    for made in ("file", "folder/a", "folder/b"):
        assert Path(made).read_text() == made * 20
    assert "up to date" in dvc("repro")


def test_all_instances_of_a_stage_by_its_name(repository: Path) -> None:
    Path("dvc.yaml").write_text(INSTANCES)
    dvc("repro")
    flip(Path("x"))
    truncate(Path("y"))
    assert remake("make") == 0
    assert (Path("x").read_text(), Path("y").read_text()) == ("x" * 9, "y" * 9)


def test_an_instance_that_is_not_there_is_an_error_and_one_that_never_ran_is_run(repository: Path) -> None:
    Path("dvc.yaml").write_text(INSTANCES)
    with pytest.raises(StudyError, match="has no stage 'make@z'") as caught:
        remake("make@z")
    assert caught.value.remedy in ("did you mean 'make@x'?", "did you mean 'make@y'?")
    assert remake("make@y") == 0
    assert (Path("x").exists(), Path("y").read_text()) == (False, "y" * 9)


def test_a_stage_that_never_ran_is_run(repository: Path) -> None:
    Path("dvc.lock").unlink()
    assert remake("make") == 0
    assert Path("file").read_text() == "file" * 20


def test_an_unknown_stage_or_graph_is_an_error(repository: Path) -> None:
    with pytest.raises(StudyError, match="has no stage 'mke'"):
        remake("mke")
    with pytest.raises(StudyError, match="does not exist"):
        remake("studies/none/dvc.yaml:make")


def test_outside_of_a_repository_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(GRAPH)
    with pytest.raises(StudyError, match=r"where \.dvc/ is"):
        remake("make")
