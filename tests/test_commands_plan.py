"""`plan`: bytes to the byte, times by arithmetic that can be done by hand, and nothing left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml

from attention_transfer import __main__ as command
from attention_transfer import config
from attention_transfer.commands import forecast as forecasting
from attention_transfer.commands.forecast import of_experiment
from attention_transfer.config import Study
from attention_transfer.layout import Layout
from attention_transfer.measuring import speeds
from attention_transfer.measuring.forecast import forecast
from attention_transfer.measuring.speeds import RunSpeed, Speeds, TeacherSpeed, measure

TINY = Layout("tiny")
ROW = 2 * 2 * 2 * 5 * 8 * 2  # bytes: queries and keys, layers, heads, tokens, head_dim, float16
MAE: dict[str, Any] = {
    "kind": "mae", "decoder": {"width": 8, "depth": 1, "heads": 2}, "mask_ratio": 0.5, "epochs": 2,
    "warmup_epochs": 0.5, "batch_size": 10, "learning_rate": 0.001, "weight_decay": 0.05,
    "crop_scale": (0.5, 1.0), "seed": 0,
}  # fmt: skip


def study(**changes: Any) -> Study:
    """A copy run, a distilled one, a scratch one; a teacher that is pre-trained."""
    values = tiny_study.make_study("copy", changes).model_dump()
    values["teachers"]["first"] = {**MAE, "architecture": values["teachers"]["first"]["architecture"]}
    distill = {
        **values["runs"]["run"],
        "method": "distill",
        "attention_loss": {"weight": 1.0},
        "layers": (1,),
    }
    scratch = {**values["runs"]["run"], "method": "scratch", "layers": None}
    values["runs"] |= {"distill": distill, "scratch": scratch, "slower": {**distill, "learning_rate": 0.001}}
    return Study.model_validate(values)


def sets_of(evaluated: Study, *names: str) -> Study:
    evaluation = evaluated.evaluation.model_copy(update={"sets": names})
    return evaluated.model_copy(update={"evaluation": evaluation})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "SECONDS", 0.01)
    monkeypatch.setattr(speeds, "LONGEST_WRITING", 0.05)
    monkeypatch.setattr(speeds, "IMPORTS", "pass")


@pytest.mark.slow
def test_everything_is_measured(quick: None, tmp_path: Path) -> None:
    found = measure(study(), tiny_study.CPU, tmp_path)
    assert set(found.teachers) == {"first", "second"}
    assert list(found.runs) == ["run", "distill", "scratch", "slower"]
    assert found.start > 0
    for name, teacher in found.teachers.items():
        assert min(teacher.forward, teacher.write, teacher.read, teacher.first_read) > 0
        assert teacher.rows >= 8
        assert (teacher.pretraining_step is not None) == (name == "first")
    for name in ("run", "distill"):
        speed = found.runs[name]
        assert speed.step is None
        assert speed.cached_step is not None
        assert speed.online_step is not None
        assert min(speed.cached_step, speed.online_step, speed.predict) > 0
        assert speed.batch == 8
    assert found.runs["scratch"].step is not None
    assert found.runs["scratch"].cached_step is None
    assert found.runs["slower"] is found.runs["distill"]  # they differ in the learning rate alone


@pytest.mark.slow
def test_maps_and_students_without_the_teachers_registers_are_measured(quick: None, tmp_path: Path) -> None:
    values = study().model_dump()
    values["attention"]["content"] = "maps"
    teacher = values["teachers"]["second"]
    plain = teacher["architecture"]
    values["teachers"] = {"first": {**teacher, "architecture": {**plain, "components": ("registers",)}}}
    values["runs"]["distill"]["architecture"] = plain
    found = measure(Study.model_validate(values), tiny_study.CPU, tmp_path)
    steps = [found.runs[name].cached_step for name in ("run", "distill")]
    assert all(step is not None and step > 0 for step in steps)
    assert found.teachers["first"].read > 0


@pytest.mark.slow
def test_a_step_that_would_take_long_is_measured_smaller(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "LONGEST_STEP", 1e-9)
    found = measure(study(), tiny_study.CPU, tmp_path)
    assert {speed.batch for speed in found.runs.values()} == {1}
    assert found.teachers["first"].pretraining_batch == 1


MEASURED = Speeds(
    load=0.0,
    start=3.0,
    teachers={
        "first": TeacherSpeed(
            forward=0.01, write=0.02, rows=8, first_read=1e6, read=64e3, pretraining_step=0.5, pretraining_batch=5
        ),
        "second": TeacherSpeed(
            forward=0.1, write=0.2, rows=8, first_read=1e6, read=1e6, pretraining_step=None, pretraining_batch=None
        ),
    },
    runs={
        "run": RunSpeed(batch=8, step=None, cached_step=0.1, online_step=0.3, predict=0.001),
        "distill": RunSpeed(batch=4, step=None, cached_step=0.1, online_step=0.2, predict=0.002),
        "scratch": RunSpeed(batch=8, step=0.05, cached_step=None, online_step=None, predict=0.001),
        "slower": RunSpeed(batch=4, step=None, cached_step=0.1, online_step=0.2, predict=0.002),
    },
)  # fmt: skip


def test_times_are_those_of_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_study.write_inputs(tmp_path)  # 60 training and 12 test images
    cached = sets_of(study(**{"attention.source": "cache", "seeds": (0, 1)}), "validation", "test")
    found = forecast(cached, TINY, MEASURED)
    assert found.counted
    # 24 labelled images, 2 views, 9 validation and 12 test images; epochs 3, batch 8: 9 steps.
    rows = {which: part.rows for which, part in found.caches["first"].items()}
    assert rows == {"views": 48, "validation": 9, "test": 12}
    assert found.caches["second"]["views"].seconds == pytest.approx(48 * 0.2)
    copy, distill, scratch = (found.runs[name] for name in ("run", "distill", "scratch"))
    assert (copy.steps, copy.step, copy.bytes) == (9, 0.1, 8 * ROW)
    assert copy.bandwidth == pytest.approx(8 * ROW / 0.1)
    assert (distill.step, distill.cached_step, distill.online_step) == (0.2, 0.2, 0.4)  # measured at batch 4
    assert distill.bytes == 8 * ROW // 2  # one layer of two
    assert (scratch.step, scratch.bytes, scratch.bandwidth) == (0.05, 0, 0.0)
    # One point of the curve, of 8 images, and 9 validation images at the end; a clean image is read at 64 kB/s.
    assert copy.train == pytest.approx(3 + 9 * 0.1 + (8 + 9) * (0.001 + ROW / 64e3))
    assert copy.predict == pytest.approx(3 + (9 + 12) * (0.001 + ROW / 64e3))
    assert distill.predict == pytest.approx(3 + 21 * 0.002)
    assert found.stages["pretrain"] == pytest.approx(2 * 3 + 2 * ((60 - 9) // 10) * 0.5 * 10 / 5)
    assert found.stages["cache"] == pytest.approx(2 * 3 + 69 * 0.02 + 69 * 0.2)
    assert found.stages["train"] == pytest.approx(2 * sum(run.train for run in found.runs.values()))
    assert found.stages["resolve"] == 4 * 3
    assert found.stages["probe"] == 2 * 3
    assert found.seconds == pytest.approx(sum(found.stages.values()))
    assert found.by_source["first"] == pytest.approx(
        {"cache": 69 * 0.02 + 2 * 9 * (0.1 + 0.2 + 0.2), "online": 2 * 9 * (0.3 + 0.4 + 0.4)}
    )
    assert found.by_source["second"] == {}


def test_an_experiment_takes_what_its_own_stages_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = sets_of(study(**{"attention.source": "cache"}), "validation")
    runs = {name: whole.runs[name] for name in ("run", "distill")}
    more = whole.model_copy(update={"name": "tiny/more", "runs": runs, "seeds": (0, 1, 2)})
    plans = forecast(whole, TINY, MEASURED).runs
    trained = 3 * sum(plans[name].train + plans[name].predict for name in runs)
    # resolve for each run; evaluate and similarity
    assert of_experiment(more, MEASURED) == pytest.approx(trained + 3.0 * (2 + 2))
    more._own_sections = ("data",)
    # data and split; of two teachers one is its own: that cache alone
    assert of_experiment(more, MEASURED) == pytest.approx(trained + 3.0 * (2 + 2 + 2) + 3 + 57 * 0.02)


def test_online_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = forecast(study(), TINY, MEASURED)
    assert not found.counted
    assert found.stages["cache"] == 2 * 3
    assert found.runs["run"].step == 0.3
    assert found.runs["run"].predict == pytest.approx(3 + 9 * (0.001 + 0.01))
    assert found.caches["first"]["views"].rows == 48  # what it would take


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bytes_are_those_of_a_real_cache(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cached = sets_of(study(**{"attention.source": "cache", "attention.dtype": dtype}), "test")
    before = forecast(cached, TINY, MEASURED).caches["first"]
    tiny_study.write_inputs(tmp_path)
    after = forecast(cached, TINY, MEASURED).caches["first"]
    for which in ("views", "validation", "test"):
        tiny_study.script("cache").write(tiny_study.make_parts(cached), "first", which)
        real = size(TINY.cache("first") / which)
        assert after[which].bytes == real
        if which != "test":  # the test images are counted only now
            assert (
                abs(before[which].bytes - real) < 64
            )  # the digits of mean, deviation and key are not known yet


def plan_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["attention_transfer", "plan", "--params", "mine.yaml", *arguments])
    command.main()


@pytest.mark.slow
def test_the_command_leaves_nothing_behind(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(study().model_dump(mode="json")))
    plan_command(monkeypatch, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["study"] == "tiny"
    assert answer["sources"]["first"] == {"source": "online", "reason": "params.yaml says so"}
    assert answer["caches"]["first"]["views"]["rows"] == 48
    assert answer["seconds"] == pytest.approx(sum(answer["stages"].values()))
    assert any("random images" in line for line in answer["statement"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    plan_command(monkeypatch)
    said = capsys.readouterr().out
    for words in ("attention of first: online", "GB/s needed", "to write", "not measured: DVC's own time"):
        assert words in said
    assert "images are not there yet: 60000 for training" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    plan_command(monkeypatch, "--once")  # as `make study` does
    assert (tmp_path / "runs" / "tiny" / "forecast.txt").read_text() == capsys.readouterr().out.rstrip("\n")


def test_once_measures_nothing_where_students_have_been_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecasting, "show", lambda *_, **__: print("measured"))
    Path("mine.yaml").write_text(yaml.safe_dump(study().model_dump(mode="json")))
    plan_command(monkeypatch, "--once")
    assert capsys.readouterr().out == "measured\n"
    TINY.student("run", 0).mkdir(parents=True)
    plan_command(monkeypatch, "--once")
    assert capsys.readouterr().out == ""


def test_the_plan_of_an_experiment_is_of_the_teachers_that_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    planned: list[Study] = []
    monkeypatch.setattr(forecasting, "show", lambda study, *_, **__: planned.append(study))
    monkeypatch.setattr(sys, "argv", ["attention_transfer", "plan", "--params", "presets/full/size.yaml"])
    command.main()
    assert set(planned[0].teachers) == {"mae_small", "mae_large"}
    assert set(planned[0].runs) == set(config.load("presets/full/size.yaml").runs)
