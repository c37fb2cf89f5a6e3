"""`plan --gpus`: the page of ImageNet says what the command says, and what is not stated stays open."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml

from attention_transfer import __main__ as command

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "imagenet.md"
HEADING = "## What it takes"


def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What a line of a page says."""
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", "attention_transfer", "plan"]
    monkeypatch.setattr(sys, "argv", ["attention_transfer", *words[3:]])
    command.main()
    return capsys.readouterr().out


def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.chdir(tmp_path)
    values = tiny_study.make_study("distill", changes).model_dump(mode="json")
    Path("mine.yaml").write_text(yaml.safe_dump(values))


def shown() -> tuple[str, str]:
    """The page's command, and what stands below it."""
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2]
    blocks = re.findall(r"(?ms)^```(?:text)?\n(.*?)^```$", section)
    return blocks[0].strip(), blocks[1]


@pytest.mark.slow
def test_the_page_shows_what_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Away from the repository, whose images, where they have been read, would be counted."""
    (tmp_path / "presets").mkdir()
    preset = "presets/imagenet1k.yaml"
    (tmp_path / preset).write_text((ROOT / preset).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    line, output = shown()
    said = plan(monkeypatch, capsys, line)
    assert output == said, f"make it anew: {line}"
    found = json.loads(plan(monkeypatch, capsys, f"{line} --json"))
    assert [fleet["limited"] for fleet in found["gpus"]] == ["compute", "compute", "too few students"]
    waits = {name: run["limited"] for name, run in found["runs"].items()}
    assert waits == {"scratch": "decoding", "finetune": "decoding", "copy": "compute", "distill": "compute"}
    assert found["disk"]["checkpoints"] == max(found["disk"].values())
    assert found["gpu_hours"] == pytest.approx(found["gpus"][0]["hours"])
    assert [path.name for path in tmp_path.iterdir()] == ["presets"]


def test_what_is_not_stated_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine(tmp_path, monkeypatch)
    line = "python -m attention_transfer plan --params mine.yaml --gpus 2"
    said = plan(monkeypatch, capsys, line)
    for words in ("state the rate of a GPU, --tflops", "--gpu-memory", "nothing was measured"):
        assert words in said
    found = json.loads(plan(monkeypatch, capsys, f"{line} --json"))
    assert found["gpu_hours"] is None
    assert found["gpus"][0]["hours"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--tflops 400", "add --gpus"),
        ("--gpus 2 --images elsewhere=3", "none of the study's image sets"),
        ("--gpus 0", "give 1 or more"),
        ("--gpus 2 --tflops nan", "not a number above 0"),
        ("--gpus 2 --images test", "give 1 or more"),
    ],
)
def test_options_that_make_no_sense(
    options: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine(tmp_path, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        plan(monkeypatch, capsys, f"python -m attention_transfer plan --params mine.yaml {options}")
    assert problem in f"{ended.value.code}{capsys.readouterr().err}"


def test_a_run_that_fits_nowhere_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine(tmp_path, monkeypatch)
    line = "python -m attention_transfer plan --params mine.yaml --gpus 8 --tflops 1 --gpu-memory 0.000001"
    assert "a run does not fit, sharded neither" in plan(monkeypatch, capsys, line)
