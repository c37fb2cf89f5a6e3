"""The stage `finetuned`: teachers with a head, kept while they match, gone when they are not named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_study
import torch
from safetensors.torch import load_file

from attention_transfer.config import Study
from attention_transfer.files import read_json
from attention_transfer.layout import Layout
from attention_transfer.training import machine

LAYOUT = Layout("tiny")
TUTOR = {"tutor": {"seed": 3, "run": {"method": "finetune", "teacher": "first", **tiny_study.RECIPE}}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_study.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "prepare", lambda: tiny_study.CPU)
    return tmp_path


def make_study(tutors: dict[str, Any]) -> Study:
    return tiny_study.make_study("finetune", {"finetuned_teachers": tutors})


def run_stage(tutors: dict[str, Any]) -> dict[str, float]:
    this = tiny_study.InMemory(
        "finetuned", {}, make_study(tutors), Path("params.yaml"), tiny_study.PIPELINE / "finetuned.py", LAYOUT
    )
    tiny_study.script("finetuned").main(this)
    return this.metrics


def weights(name: str = "tutor") -> dict[str, torch.Tensor]:
    found = load_file(LAYOUT.finetuned_teacher(name) / "model.safetensors")
    return {key: value.clone() for key, value in found.items()}  # the file is mapped, and will change


def test_it_is_the_student_that_the_run_would_train(folder: Path) -> None:
    metrics = run_stage(TUTOR)
    tiny_study.run_train(make_study(TUTOR), LAYOUT, "run", 3)
    student = load_file(LAYOUT.student("run", 3) / "model.safetensors")
    found = weights()
    assert found.keys() == student.keys()
    assert all(torch.equal(found[name], student[name]) for name in found)
    assert found["head.weight"].shape[0] == 3
    assert 0 <= metrics["tutor_validation_accuracy"] <= 1


@pytest.mark.slow
def test_what_matches_is_kept_and_what_changed_is_made_anew(folder: Path) -> None:
    run_stage(TUTOR)
    path = LAYOUT.finetuned_teacher("tutor") / "model.safetensors"
    before, first = path.stat().st_mtime_ns, weights()
    run_stage({**TUTOR, "other": {**TUTOR["tutor"], "seed": 4}})
    assert path.stat().st_mtime_ns == before
    other = weights("other")
    assert not torch.equal(first["head.weight"], other["head.weight"])

    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    run_stage(TUTOR)
    assert all(torch.equal(first[name], value) for name, value in weights().items())
    assert not LAYOUT.finetuned_teacher("other").exists()

    changed = {**TUTOR["tutor"], "run": {**TUTOR["tutor"]["run"], "learning_rate": 0.02}}
    run_stage({"tutor": changed})
    assert not torch.equal(first["head.weight"], weights()["head.weight"])


def test_a_study_without_such_teachers_has_an_empty_output(folder: Path) -> None:
    run_stage(TUTOR)
    assert run_stage({}) == {}
    assert [path.name for path in LAYOUT.finetuned_teachers.iterdir()] == ["names.json"]
    assert read_json(LAYOUT.finetuned_teachers / "names.json", made_by="finetuned") == []
