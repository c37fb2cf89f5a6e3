"""The stage `pretrain`: every kind of teacher, on every kind of images, obeys its params."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from attention_transfer.config_teachers import Architecture, Teacher
from attention_transfer.data import shifts
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout
from attention_transfer.models import pretraining, vit
from attention_transfer.training import machine

pytestmark = pytest.mark.slow  # it trains

LAYOUT = Layout("tiny")
SHARED: dict[str, Any] = {
    "architecture": tiny_study.ARCHITECTURE, "epochs": 2, "warmup_epochs": 1.0, "batch_size": 8,
    "learning_rate": 0.01, "weight_decay": 0.05, "crop_scale": (0.5, 1.0), "seed": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mae": {"decoder": {"width": 8, "depth": 1, "heads": 2}, "mask_ratio": 0.5},
    "simmim": {"mask_ratio": 0.5},
    "moco_v3": {
        "hidden_width": 16, "projection_width": 8, "temperature": 0.2, "base_momentum": 0.9,
        "frozen_patches": True,
    },
    "dino": {
        "hidden_width": 16, "bottleneck_width": 8, "prototypes": 12, "student_temperature": 0.1,
        "teacher_temperature": 0.04, "centre_momentum": 0.9, "base_momentum": 0.9,
    },
    "supervised": {"groups": (0, 1, 1), "label_smoothing": 0.1},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_study.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "prepare", lambda: tiny_study.CPU)
    return tmp_path


def pretrain(kind: str, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The teacher's weights, and the stage's metrics."""
    teacher = {"kind": kind, **SHARED, **KINDS[kind], **changes}
    study = tiny_study.make_study("scratch", {"teachers.first": teacher})
    this = tiny_study.InMemory(
        "pretrain",
        {"teacher": "first"},
        study,
        Path("params.yaml"),
        tiny_study.PIPELINE / "pretrain.py",
        LAYOUT,
    )
    this.record.mkdir(parents=True, exist_ok=True)
    tiny_study.script("pretrain").main(this)
    weights = load_file(LAYOUT.teacher_weights("first"))
    return {name: value.clone() for name, value in weights.items()}, this.metrics


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@every_kind
def test_a_teacher_is_an_encoder_without_its_method(kind: str, folder: Path) -> None:
    """It has the weights of an untrained teacher of its seed, moved: no momentum network, no heads."""
    weights, metrics = pretrain(kind)
    untrained = vit.create(
        tiny_study.make_parts(tiny_study.make_study("scratch")).teacher_arguments("first"), seed=0
    ).state_dict()
    assert weights.keys() == untrained.keys()
    moved = {name for name in weights if not torch.equal(weights[name], untrained[name])}
    assert {name for name in weights if "qkv" in name} <= moved
    frozen = {"patch_embed.proj.weight", "patch_embed.proj.bias"} & (weights.keys() - moved)
    assert bool(frozen) == (kind == "moco_v3")
    assert metrics["images"] == 60 - 9  # all but the validation images
    assert metrics["steps"] == 2 * (51 // 8)
    assert 0 < metrics["pretraining_loss"] < 10


def test_the_moving_average_of_dino_is_the_teacher_and_of_others_what_was_trained() -> None:
    parts = tiny_study.make_parts(tiny_study.make_study("scratch"))
    for kind, own in KINDS.items():
        params = TypeAdapter(Teacher).validate_python({"kind": kind, **SHARED, **own})
        model: Any = pretraining.build(params, parts.teacher_arguments("first"), steps=3)
        expected = model.teacher.encoder if kind == "dino" else model.encoder
        assert pretraining.result(model) is expected


@every_kind
def test_equal_params_give_equal_bits_and_every_value_counts(kind: str, folder: Path) -> None:
    before = pretrain(kind)[0]
    assert same(before, pretrain(kind)[0])
    changes: dict[str, Any] = {
        "epochs": 3, "warmup_epochs": 0.0, "batch_size": 9, "learning_rate": 0.02, "weight_decay": 0.5,
        "crop_scale": (0.2, 0.6), "seed": 1, "images": "fractals",
    }  # fmt: skip
    own: dict[str, Any] = {
        "decoder": {"width": 16, "depth": 1, "heads": 2}, "mask_ratio": 0.8, "hidden_width": 24,
        "projection_width": 12, "bottleneck_width": 12, "temperature": 0.5, "base_momentum": 0.5,
        "frozen_patches": False, "prototypes": 20, "student_temperature": 0.2, "teacher_temperature": 0.06,
        "centre_momentum": 0.5, "groups": (0, 1, 0), "label_smoothing": 0.3,
    }  # fmt: skip
    fields = type(TypeAdapter(Teacher).validate_python({"kind": kind, **SHARED, **KINDS[kind]})).model_fields
    tried = {key: value for key, value in {**changes, **own}.items() if key in fields}
    assert tried.keys() == fields.keys() - {"kind", "architecture"}
    if kind == "supervised":
        del tried["images"]
    idle = [key for key, value in tried.items() if same(before, pretrain(kind, **{key: value})[0])]
    assert idle == []


@pytest.mark.parametrize("kind", ["simmim", "moco_v3", "dino", "supervised"])
@pytest.mark.parametrize("component", ["registers", "rotary", "relative_bias"])
def test_other_architectures_are_pre_trained_too(kind: str, component: str, folder: Path) -> None:
    architecture = {**tiny_study.ARCHITECTURE, "components": (component,)}
    weights, metrics = pretrain(kind, architecture=architecture)
    arguments = vit.model_arguments(Architecture(**architecture), image_size=8, channels=1, classes=0)
    untrained = vit.create(arguments, seed=0).state_dict()
    assert weights.keys() == untrained.keys()
    assert not same(weights, untrained)
    assert np.isfinite(metrics["pretraining_loss"])


def test_digits_are_other_images_and_there_are_few(folder: Path) -> None:
    digits, metrics = pretrain("mae", images="digits", epochs=1, warmup_epochs=0.0, batch_size=256)
    assert metrics["images"] == len(shifts.digits(8, 1)[0])
    assert not same(digits, pretrain("mae", epochs=1, warmup_epochs=0.0)[0])


def test_groups_must_number_the_tasks_classes(folder: Path) -> None:
    with pytest.raises(StudyError, match="4 numbers, but the task has 3 classes") as caught:
        pretrain("supervised", groups=(0, 1, 1, 0))
    assert caught.value.where.endswith("teachers.first.groups")


@pytest.mark.parametrize("groups", [(0, 0, 0), (0, 2, 2), (1, 2, 1)])
def test_groups_are_numbered_without_gaps(groups: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="from 0 without a gap"):
        TypeAdapter(Teacher).validate_python(
            {"kind": "supervised", **SHARED, **KINDS["supervised"], "groups": groups}
        )


def test_other_images_have_no_labels_of_the_task() -> None:
    with pytest.raises(ValueError, match="none of the task's labels"):
        TypeAdapter(Teacher).validate_python(
            {"kind": "supervised", **SHARED, **KINDS["supervised"], "images": "digits"}
        )
