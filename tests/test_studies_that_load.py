"""Random plausible values: a params.yaml that is accepted is one whose every run can be trained and saved."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml
from tiny_study import DEPTH, HEADS

from attention_transfer import config, plan
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout

METHODS = tuple(tiny_study.METHODS)
LAYERS: tuple[Any, ...] = ("all", [], [0], [1], [0, 1], [1, 0], [0, 0], [-1], [DEPTH], 1, "last", None)
HEADS_OF: tuple[Any, ...] = ("all", [0], [1], [0, 1], [HEADS], [-1], [], None, 2)
WEIGHTS: tuple[Any, ...] = (0, 0.0, 1.0, -1.0, 3, "3", None)
CHOICES: dict[str, tuple[Any, ...]] = {
    "runs.run.method": METHODS,
    "runs.run.teacher": ("first", "second", "third", None),
    "runs.run.initial": ("first", "second", None),
    "runs.run.layers": LAYERS,
    "runs.run.heads": HEADS_OF,
    "runs.run.heads_per_layer": (1, 2, 3, 0, None),
    "runs.run.transfer": ("map", "query", "key", "value", "output"),
    "runs.run.temperature": (0.5, 1.0, 2.0, 0.0, -1.0),
    "runs.run.averages": (
        [],
        ["examples"],
        ["queries"],
        ["heads"],
        ["layers"],
        ["examples", "heads"],
        "heads",
    ),
    "runs.run.attention_loss": (
        {"weight": 1.0},
        {"weight": 1.0, "reduction": "mean"},
        {"weight": -1.0},
        None,
        {},
    ),
    "runs.run.feature_loss": ({"weight": 1.0}, {"weight": 0.5, "feature": "last"}, None, {}),
    "runs.run.logit_loss": ({"weight": 1.0, "teacher": "tutor"}, {"weight": 1.0, "teacher": "none"}, None),
    "runs.run.architecture": (
        None,
        {**tiny_study.ARCHITECTURE, "depth": 3},
        {**tiny_study.ARCHITECTURE, "heads": 4},
        {**tiny_study.ARCHITECTURE, "patch_size": 2},
        {**tiny_study.ARCHITECTURE, "width": 24, "heads": 3},
        {**tiny_study.ARCHITECTURE, "patch_size": 3},
    ),
    "runs.run.epochs": (1, 2, 0, 1.5),
    "runs.run.warmup_epochs": (0, 0.5, 1, 2),
    "runs.run.batch_size": (1, 2, 7, 8, 24, 25, 0),
    "runs.run.label_smoothing": (0.0, 0.3, 1.0, -0.1),
    "runs.run.layer_decay": (1.0, 0.5, 0.0, 1.5),
    "runs.run.drop_path": (0.0, 0.5, 1.0),
    "runs.run.ema": (None, 0.9, 0.0, 1.0),
    "runs.run.weight_decay": (0.0, 0.05, -1),
    "views.per_image": (1, 3, 0),
    "views.mixup": (0.0, 0.8, -1.0),
    "views.cutmix": (0.0, 1.0),
    "views.erase": (0.0, 1.0),
    "data.labelled": (24, 3, 2, 1, 60),
    "data.validation": (9, 1, 30, 60),
    "data.image_size": (8, 12, 4, 10),
    "attention.dtype": ("float16", "float32", "int8"),
    "attention.content": ("queries_and_keys", "maps"),
    "training.precision": ("float32", "bfloat16"),
    "training.clip_norm": (None, 1.0, 0.0),
    "training.validate_every": (1, 2, 5),
    "training.curve_images": (1, 9, 100),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_study.write_inputs(tmp_path)
    return tmp_path


def drawn(source: random.Random) -> dict[str, Any]:
    """The tiny study's values with up to three others; null where a key is left out."""
    method = source.choice(METHODS)
    values = tiny_study.make_study(method).model_dump(mode="json", exclude_unset=True)
    for key in source.sample(list(CHOICES), source.randint(1, 3)):
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node[part]
        node[last] = source.choice(CHOICES[key])
    return values


@pytest.mark.slow
def test_a_study_that_loads_can_be_trained_and_comes_back_from_its_own_text(folder: Path) -> None:
    source, trained, refused = random.Random(0), 0, 0
    path = folder / "params.yaml"
    for _ in range(400):
        values = drawn(source)
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        try:
            study = config.load(path)
        except StudyError:
            refused += 1
            continue
        path.write_text(yaml.safe_dump(study.model_dump(mode="json")), encoding="utf-8")
        assert config.load(path) == study
        plan.check_room(study, Layout("tiny"), path)
        if study.data.model_dump() != tiny_study.make_study("scratch").data.model_dump():
            continue  # the images and splits that are there are those of the tiny study
        try:
            tiny_study.train(study)
        except StudyError as error:  # what only the images can tell
            raise AssertionError(f"{values['runs']} {values['views']}: {error}") from error
        trained += 1
    assert trained > 100
    assert refused > 100
