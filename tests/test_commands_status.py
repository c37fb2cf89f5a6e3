"""`status`, of a real graph of DVC with a graph of an experiment beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attention_transfer.commands import status
from attention_transfer.errors import StudyError

GRAPH = Path("dvc.yaml")


def stage(name: str, deps: list[str], **more: object) -> dict[str, object]:
    return {"cmd": f"cat {' '.join(deps)} > {name}", "deps": deps, "outs": [name], **more}


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data -> train (twice) -> report; report waits for `more` of another graph too. All have run; two have records."""
    monkeypatch.chdir(tmp_path)
    dvc("init", "--no-scm", "--quiet")
    for name in ("pipeline", "other", "metrics"):
        Path(name).mkdir()
    Path("pipeline/data.py").write_text("1")
    Path("source").write_text("1")
    Path("params.yaml").write_text("rate: 1\nother: 1\n")
    train = {
        "matrix": {"seed": [0, 1]},
        "cmd": "cat data > train-${item.seed}",
        "deps": ["data"],
        "outs": ["train-${item.seed}"],
        "params": ["rate"],
    }
    stages = {
        "data": stage("data", ["source", "pipeline/data.py"]),
        "train": train,
        "report": stage("report", ["train-0", "train-1", "more"]),
    }
    GRAPH.write_text(yaml.safe_dump({"stages": stages}))
    Path("other/dvc.yaml").write_text(
        yaml.safe_dump({"stages": {"more": stage("more", ["source"], wdir="..")}})
    )
    dvc("repro", "dvc.yaml", "other/dvc.yaml")
    for name, seconds in (("train@0", 30.0), ("data", 5.0)):
        file = Path("metrics") / name / "run.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"dvc": {"stage": name}, "seconds": seconds}))
    return tmp_path


def examine() -> dict[str, tuple[tuple[str, ...], float | None]]:
    return {each.stage: (each.reasons, each.seconds) for each in status.examine(GRAPH, Path("metrics"))}


@pytest.mark.slow
@pytest.mark.usefixtures("repository")
def test_what_changed_what_may_follow_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert examine() == {}
    status.show(GRAPH, Path("metrics"), as_json=False)
    assert capsys.readouterr().out == "dvc.yaml: all stages are up to date\n"

    Path("params.yaml").write_text("rate: 2\nother: 2\n")
    # The second seed has no record: its family's time is taken.
    assert examine() == {
        "train@0": (("rate",), 30.0),
        "train@1": (("rate",), 30.0),
        "report": ((), None),
    }
    status.show(GRAPH, Path("metrics"), as_json=False)
    text = capsys.readouterr().out
    assert re.search(r"train +2 +rate +60 s\n", text)
    assert re.search(r"report +1 +not known\n", text)
    assert "All of them: at least 60 s" in text

    Path("params.yaml").write_text("rate: 1\nother: 2\n")
    Path("pipeline/data.py").write_text("2")
    Path("train-1").unlink()
    found = examine()
    assert found["data"] == (("code",), 5.0)
    assert found["train@0"] == ((), 30.0)
    assert found["train@1"] == (("outputs are missing",), 30.0)
    assert found["report"][0] == ("inputs are missing",)
    order = [*found]
    assert (order[0], order[-1]) == ("data", "report")


@pytest.mark.slow
@pytest.mark.usefixtures("repository")
def test_a_stage_of_another_graph_that_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    more = stage("more", ["source", "pipeline/data.py"], wdir="..")
    Path("other/dvc.yaml").write_text(yaml.safe_dump({"stages": {"more": more}}))
    found = examine()
    assert set(found) == {"other/dvc.yaml:more", "report"}
    assert found["report"] == ((), None)
    Path("metrics/data/run.json").write_text("{")  # damaged: whoever reads it says so
    status.show(GRAPH, Path("metrics"), as_json=True)
    assert [each["stage"] for each in json.loads(capsys.readouterr().out)] == [
        "other/dvc.yaml:more",
        "report",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("repository")
def test_a_graph_that_is_not_there_or_cannot_be_read() -> None:
    with pytest.raises(StudyError, match=r"none/dvc\.yaml: does not exist"):
        status.examine(Path("none/dvc.yaml"), Path("metrics"))
    GRAPH.write_text("stages: {data: {cmd: [}}\n")
    with pytest.raises(StudyError, match=r"(?s)dvc\.yaml: DVC cannot"):
        status.examine(GRAPH, Path("metrics"))
