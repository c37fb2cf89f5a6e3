"""The formulas of floating-point operations against PyTorch's own count of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_study
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attention_transfer.config import Study
from attention_transfer.measuring import flops_of_runs
from attention_transfer.measuring.subject import CLASSES, Subject
from attention_transfer.models import pretraining, vit
from attention_transfer.transfer.method import Given
from attention_transfer.transfer.teacher_source import OnlineTeacher

BATCH, DEPTH = 2, tiny_study.DEPTH
PRODUCT = 2 * tiny_study.TOKENS**2 * 16
VALUES = (
    2 * tiny_study.TOKENS * 16 * 16
)  # of a frozen teacher's last layer: computed with its queries and keys


def counted(work: Callable[[], Any]) -> float:
    """An image; fused attention, which PyTorch does not count on a CPU, as the products that it is made of."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops() / BATCH


class Counted:
    """One run's student and teacher on random images."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.subject = Subject(study, tiny_study.CPU, BATCH)
        self.method = self.subject.method("run")
        self.images = self.subject.clean(self.subject.labelled.examples)
        self.rows = self.subject.labelled.examples
        self.labels = torch.zeros(BATCH, dtype=torch.long)
        needs = self.method.needs
        tutor = study.runs["run"].logit_loss
        network = self.subject.teacher("first") if tutor is None else self.subject.tutor(tutor.teacher)
        self.teacher = None if needs is None else OnlineTeacher(network, needs, "float16")

    def given(self) -> Given | None:
        return self.teacher(self.images, self.rows, 0) if self.teacher else None

    @property
    def taught(self) -> float:
        return counted(self.given)

    @property
    def step(self) -> float:
        self.method.train()
        given = self.given()
        return counted(lambda: self._backward(given))

    def _backward(self, given: Given | None) -> None:
        self.method.loss(self.images, self.labels, given).total.backward()

    @property
    def prediction(self) -> float:
        given = self.given() if self.method.teacher_at_inference else None
        with torch.no_grad():
            return counted(lambda: self.method.logits(self.method.student, self.images, given))


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "components": {"components": ("layer_scale", "registers", "swiglu", "rotary", "qk_norm")},
    "relative bias": {"components": ("relative_bias", "layer_scale")},
    "pre-norm": {"components": ("pre_norm",), "class_token": False, "mlp_ratio": 3.0},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", ["scratch", "linear_probe"])
def test_a_student_without_a_teacher(method: str, kind: str) -> None:
    architecture = {**tiny_study.ARCHITECTURE, **ARCHITECTURES[kind]}
    study = tiny_study.make_study(method, {"teachers.first.architecture": architecture})
    found = Counted(study)
    assert found.step == flops_of_runs.training(study, "run", CLASSES).both
    assert found.prediction == flops_of_runs.predicting(study, "run", CLASSES, cached=False).both


@pytest.mark.parametrize("layers", ["all", (0,)])
@pytest.mark.parametrize("method", ["copy", "distill"])
def test_attention_from_a_cache_and_from_the_teacher(method: str, layers: Any) -> None:
    found = Counted(tiny_study.make_study(method, {"runs.run.layers": layers}))
    count = DEPTH if layers == "all" else 1
    cached = tiny_study.make_study(method, {"runs.run.layers": layers, "attention.source": "cache"})
    of_cached = flops_of_runs.training(cached, "run", CLASSES)
    # PyTorch does not count `baddbmm_`, by which two of a distilled layer's gradients are added up in place.
    uncounted = 2 * count * PRODUCT if method == "distill" else 0
    assert found.step + uncounted == of_cached.both
    assert of_cached.teacher == count * PRODUCT
    # Online, the logits of the teacher's maps are counted once, where both the teacher and the step make them.
    online = flops_of_runs.training(found.study, "run", CLASSES)
    assert found.taught == online.teacher - PRODUCT + VALUES
    assert found.step + uncounted == online.student + count * PRODUCT
    predicted = flops_of_runs.predicting(cached, "run", CLASSES, cached=True)
    assert found.prediction == predicted.both


@pytest.mark.parametrize("method", ["distill_features", "distill_logits"])
def test_features_and_logits(method: str) -> None:
    found = Counted(tiny_study.make_study(method))
    expected = flops_of_runs.training(found.study, "run", CLASSES)
    assert (found.step, found.taught) == (expected.student, expected.teacher)


def test_the_pass_that_fills_a_cache() -> None:
    found = Counted(tiny_study.make_study("copy"))
    assert found.taught == flops_of_runs.reading(found.study, "first") + VALUES


SELF_SUPERVISED = {"hidden_width": 12, "base_momentum": 0.9}
TEACHERS: dict[str, dict[str, Any]] = {
    "mae": {"decoder": {"width": 8, "depth": 2, "heads": 2}, "mask_ratio": 0.5},
    "simmim": {"mask_ratio": 0.5},
    "moco_v3": {**SELF_SUPERVISED, "projection_width": 6, "temperature": 0.2, "frozen_patches": True},
    "dino": {
        **SELF_SUPERVISED, "bottleneck_width": 6, "prototypes": 20, "student_temperature": 0.1,
        "teacher_temperature": 0.04, "centre_momentum": 0.9,
    },
    "supervised": {"groups": (0, 1, 1), "label_smoothing": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("kind", TEACHERS)
def test_pretraining(kind: str) -> None:
    params = {
        "kind": kind, "architecture": tiny_study.ARCHITECTURE, "epochs": 2, "warmup_epochs": 0.5,
        "batch_size": BATCH, "learning_rate": 0.001, "weight_decay": 0.05, "crop_scale": (0.5, 1.0), "seed": 0,
        **TEACHERS[kind],
    }  # fmt: skip
    study = tiny_study.make_study("scratch", {"teachers.first": params})
    teacher: Any = study.teachers["first"]
    arguments = vit.model_arguments(teacher.architecture, image_size=8, channels=1, classes=0)
    model: Any = pretraining.build(teacher, arguments, steps=2).train()
    batch: list[Tensor] = [torch.randn(BATCH, 1, 8, 8) for _ in range(model.views)]
    labels = [torch.tensor([0, 1])] if model.labelled else []
    assert counted(lambda: model(*batch, *labels).backward()) == flops_of_runs.pretraining(study, "first")
