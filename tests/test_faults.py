"""A short run of the fault driver, the long one being recorded in docs/reliability.md; and two DVCs at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "faults"))

import copies  # noqa: E402

pytestmark = pytest.mark.slow

KILLED = "pretrain,cache,train,predict"


@pytest.fixture(scope="module")
def start(warm_path: str) -> Callable[..., subprocess.Popen[str]]:
    """Starts `dvc repro`, whose stages begin their work at once: the closer they come together."""
    return lambda study, *arguments: subprocess.Popen(
        ["dvc", "repro", *arguments],
        cwd=study.folder,
        env=study.environment("") | {"PATH": warm_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def driven(
    tmp_path_factory: pytest.TempPathFactory, warm_path: str, start: Callable[..., subprocess.Popen[str]]
) -> Path:
    """A kill in each of four stages, of a part of the smoke study; the moments are drawn from a fixed seed.

    The killed stages start as a user's do; the others need not, nor does the undisturbed run, which is found done.
    """
    folder = tmp_path_factory.mktemp("faults")
    assert right_or_refused(start(copies.Study(folder / "undisturbed", small=True), copies.GRAPH)) == [True]
    command = [sys.executable, "faults/kill.py", folder, "--kills", "4", "--small", "--seed", "1"]
    ended = subprocess.run(
        [*command, "--stages", KILLED],
        cwd=ROOT,
        env=os.environ | {"PATH": warm_path, "COLD_STAGES": KILLED},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert (folder / "kills.json").exists(), ended.stdout + ended.stderr
    return folder


def test_four_kills_change_no_bit_and_leave_nothing_behind(driven: Path) -> None:
    found = json.loads((driven / "kills.json").read_text())
    assert {kill["stage"].partition("@")[0] for kill in found["kills"]} == set(KILLED.split(","))
    assert (found["differing"], found["left_behind"]) == ([], [])
    assert found["bit_identical"]
    assert found["files"] > 20


def right_or_refused(*started: subprocess.Popen[str]) -> list[bool]:
    """Which of them ended well; DVC says of what the others wanted that it is busy."""
    texts = [process.communicate(timeout=600)[0] for process in started]
    for process, text in zip(started, texts, strict=True):
        assert process.returncode == 0 or re.search(r"is busy|Unable to acquire lock", text), text[-2000:]
    return [process.returncode == 0 for process in started]


def test_two_dvc_repro_in_one_checkout(driven: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Started at the same moment on a study of which nothing is there yet."""
    study = copies.Study(driven / "shared", small=True)
    right_or_refused(*(start(study, copies.GRAPH) for _ in range(2)))
    assert right_or_refused(start(study, copies.GRAPH)) == [True]
    assert copies.differing(copies.Study(driven / "undisturbed"), study) == []
    assert "didn't change" in start(study, copies.GRAPH).communicate()[0]
    assert study.temporaries() == set()


def test_stages_side_by_side_and_a_report_beside_a_training(
    driven: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Forced to run again, with the same results: two trainings, and what reads their records."""
    study = copies.Study(driven / "undisturbed")
    before = copies.contents(study)
    stages = ("train@scratch-0", "train@distill-0", "evaluate", "report")
    ended = right_or_refused(
        *(start(study, "--force", "--single-item", f"{copies.GRAPH}:{stage}") for stage in stages)
    )
    assert any(ended)
    assert right_or_refused(start(study, copies.GRAPH)) == [True]
    assert copies.contents(study) == before
