"""The stage `probe`: what a teacher's features are worth, from the labelled and the validation images alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_study
import torch
from sklearn.neighbors import KNeighborsClassifier

from attention_transfer.layout import Layout
from attention_transfer.training import machine

LAYOUT = Layout("tiny")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_study.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "prepare", lambda: tiny_study.CPU)
    return tmp_path


def probe() -> dict[str, float]:
    this = tiny_study.InMemory(
        "probe",
        {"teacher": "first"},
        tiny_study.make_study("scratch"),
        Path("params.yaml"),
        tiny_study.PIPELINE / "probe.py",
        LAYOUT,
    )
    tiny_study.script("probe").main(this)
    return this.metrics


def test_neighbours_are_those_of_the_pooled_patch_tokens(folder: Path) -> None:
    parts = tiny_study.make_parts(tiny_study.make_study("scratch"))
    teacher, labelled, validation = parts.teacher("first"), parts.split("labelled"), parts.split("validation")

    def directions(numbers: np.ndarray) -> np.ndarray:
        images = parts.clean(parts.train.images[numbers])(np.arange(len(numbers)))
        with torch.no_grad():
            tokens = teacher.forward_features(images)[:, 1:].double().mean(dim=1)
        return torch.nn.functional.normalize(tokens, dim=1).numpy()

    neighbours = KNeighborsClassifier(
        20, weights=lambda far: np.exp((1 - far**2 / 2) / 0.07), algorithm="brute"
    )
    neighbours.fit(directions(labelled), parts.train.labels[labelled])
    expected = neighbours.score(directions(validation), parts.train.labels[validation])
    found = probe()
    assert found["knn_accuracy"] == pytest.approx(expected)
    assert found["logistic_regression_accuracy"] > 0.5  # the tiny images are easily told apart
    assert 1 <= found["effective_rank"] <= 9
    assert (found["labelled"], found["validation"]) == (24, 9)


def test_the_same_features_give_the_same_numbers_and_another_teacher_others(folder: Path) -> None:
    first = probe()
    assert probe() == first
    parts = tiny_study.make_parts(tiny_study.make_study("scratch", {"teachers.first.seed": 9}))
    tiny_study.vit.save(
        LAYOUT.teacher("first"),
        tiny_study.vit.create(parts.teacher_arguments("first"), seed=9),
        parts.teacher_arguments("first"),
    )
    assert probe()["effective_rank"] != first["effective_rank"]
