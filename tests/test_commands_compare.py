"""`compare`: two studies, and one at two revisions, against SciPy's paired interval."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from attention_transfer.commands import compare
from attention_transfer.errors import StudyError

OLD = {("copy", seed): 0.70 + 0.01 * seed for seed in range(3)} | {("gone", 0): 0.5}
NEW = {("copy", seed): 0.72 + 0.013 * seed for seed in range(4)} | {("added", 0): 0.6}


def write(name: str, params: str, accuracies: dict[tuple[str, int], float], experiment: str = "") -> None:
    file = Path("params.yaml") if name == "core" else Path("presets", f"{name}.yaml")
    file = file.with_suffix("") / f"{experiment}.yaml" if experiment else file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(params)
    scores = Path("metrics") / name / "evaluate" / experiment / "scores.csv"
    scores.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{run},{seed},test,,0,{value}" for (run, seed), value in accuracies.items()]
    # Under shift: the mean of two.
    lines += [
        f"{run},{seed},shifts,fog,{s},{value - s / 10}"
        for (run, seed), value in accuracies.items()
        for s in (1, 2)
    ]
    scores.write_text("\n".join(["run,seed,set,shift,severity,accuracy", *lines]) + "\n")


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default study at two revisions, and beside it one with an experiment."""
    monkeypatch.chdir(tmp_path)
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    git("init")
    write("core", "name: core\nruns: {copy: {learning_rate: 1e-3, layers: [0]}}\n", OLD)
    git("add", ".")
    git("commit", "-m", "old")
    write("core", "name: core\nruns: {copy: {learning_rate: 0.001, layers: [1]}, added: {epochs: 3}}\n", NEW)
    write("whole", "name: whole\nruns: {copy: {epochs: 1}}\ndata: {seed: 0, labelled: 9}\n", OLD)
    write(
        "whole",
        "name: whole/part\nextends: ../whole.yaml\nruns: {}\ndata: {seed: 7}\n",
        NEW,
        experiment="part",
    )
    git("add", ".")
    git("commit", "-m", "new")


@pytest.mark.usefixtures("repository")
def test_two_revisions(capsys: pytest.CaptureFixture[str]) -> None:
    compare.show("HEAD~1", "core", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["first"] == "HEAD~1:core"
    assert found["params"] == {"runs.copy.layers": [[0], [1]], "runs.added.epochs": ["absent", 3]}
    by_run = {(row["run"], row["set"]): row for row in found["results"]}
    assert set(by_run) == {(run, which) for run in ("copy", "gone", "added") for which in ("test", "shifts")}
    old, new = (np.array([values["copy", seed] for seed in range(3)]) for values in (OLD, NEW))
    expected = stats.ttest_rel(new, old).confidence_interval(0.95)
    for which, drop in (("test", 0.0), ("shifts", 0.15)):
        row = by_run["copy", which]
        assert row["n"] == 3
        assert row["first"][0] == pytest.approx(old.mean() - drop)
        assert row["second"][0] == pytest.approx(np.mean([NEW["copy", seed] for seed in range(4)]) - drop)
        assert row["difference"] == pytest.approx([(new - old).mean(), expected.low, expected.high])
    assert by_run["gone", "test"]["second"] is None
    assert by_run["gone", "test"]["first"] == [0.5, None, None]
    assert by_run["added", "test"]["difference"] is None


@pytest.mark.usefixtures("repository")
def test_a_study_and_its_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    compare.show("whole", "HEAD:whole/part", as_json=False)
    text = capsys.readouterr().out
    assert re.search(r"data\.seed +\| 0 +\| 7 ", text)
    assert "data.labelled" not in text
    assert re.search(r"runs\.copy +\| present +\| absent", text)
    assert re.search(r"\| copy +\| test +\| 71\.00 \[.*\| 73\.95 \[.*\| 2\.30 \[.*\| 3 ", text)
    assert re.search(r"\| gone +\| test +\| 50\.00 \(no interval from one\) +\| – +\| – +\| 0 ", text)


@pytest.mark.usefixtures("repository")
def test_what_one_side_lacks_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A whole run or teacher; of those that both have, each value that differs. Long values are cut."""
    seeds = [*range(40)]
    runs = "{copy: {method: copy, epochs: 2, layers: [0]}, other: {method: distill, epochs: 2}}"
    write("first", f"name: first\nseeds: {seeds}\nruns: {runs}\nensembles: {{}}\n", OLD)
    write("second", "name: second\nseeds: [0]\nruns: {copy: {method: copy, epochs: 3}}\n"
          "ensembles: {pair: {members: [copy, copy]}}\nteachers: {mae: {kind: mae, seed: 0}}\n", OLD)  # fmt: skip
    compare.show("first", "second", as_json=False)
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()[2:]
    rows = {
        key: tuple(pair)
        for key, *pair in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    }
    assert rows.pop("seeds") == (str(seeds)[: compare.LONGEST - 2] + " …", "[0]")
    assert rows == {
        "name": ("first", "second"),
        "runs.copy.epochs": ("2", "3"),
        "runs.copy.layers": ("[0]", "absent"),
        "runs.other": ("distill", "absent"),
        "ensembles.pair": ("absent", "present"),
        "teachers.mae": ("absent", "mae"),
    }


@pytest.mark.usefixtures("repository")
def test_a_study_and_itself(capsys: pytest.CaptureFixture[str]) -> None:
    compare.show("core", "HEAD", as_json=False)
    text = capsys.readouterr().out
    assert "The params are the same." in text
    assert re.search(r"\| copy +\| test .*\| 0\.00 \[0\.00, 0\.00\] +\| 4 ", text)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing: is no study here and no revision"),
        ("nothing:core", "nothing:core: is no study here and no revision"),
        ("HEAD:other", "HEAD:other: there are no params of this study"),
        ("HEAD:whole/other", "HEAD:whole/other: has no such experiment"),
        ("HEAD~1:whole", "HEAD~1:whole: there are no params of this study"),
    ],
)
def test_what_cannot_be_compared(name: str, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        compare.show("core", name, as_json=False)
    assert str(caught.value).startswith(message)


@pytest.mark.usefixtures("repository")
def test_a_study_without_results_and_one_with_damaged_ones() -> None:
    scores = Path("metrics/whole/evaluate/scores.csv")
    scores.write_text("run,seed\n")
    with pytest.raises(StudyError, match=r"whole: .*scores\.csv cannot be read"):
        compare.show("core", "whole", as_json=False)
    scores.unlink()
    with pytest.raises(StudyError, match=r"whole: has no results: metrics/whole/evaluate/scores\.csv"):
        compare.show("core", "whole", as_json=False)
