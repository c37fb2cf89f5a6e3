"""The formula of a training's memory against the tensors that PyTorch keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_study
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attention_transfer.config import Study
from attention_transfer.measuring import memory
from attention_transfer.measuring.subject import CLASSES, Subject
from attention_transfer.training.optimisation import optimiser
from attention_transfer.transfer.teacher_source import OnlineTeacher

BATCH = 4
# Tokens enough for losses and copies that keep no map, as on a GPU; widths at which small tensors do not count.
SHAPE = {"patch_size": 4, "width": 96, "depth": 4, "heads": 12, "mlp_ratio": 4.0}
IMAGE = {"data.image_size": 32}


def make(method: str, **changes: Any) -> Study:
    architecture = {**SHAPE, **changes.pop("architecture", {})}
    return tiny_study.make_study(method, {**IMAGE, "teachers.first.architecture": architecture, **changes})


def kept(study: Study) -> float:
    """Bytes an image that a step's forward pass leaves for its backward pass, weights and their copies apart."""
    subject = Subject(study, tiny_study.CPU, BATCH)
    method = subject.method("run")
    images, rows = subject.clean(subject.labelled.examples), subject.labelled.examples
    given = None
    if method.needs is not None:
        given = OnlineTeacher(subject.teacher("first"), method.needs, "float16")(images, rows, 0)
    shapes = {tuple(weight.shape) for weight in method.student.parameters()}
    shapes |= {tuple(reversed(shape)) for shape in shapes}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in shapes:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    method.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=subject.bfloat16):
            loss = method.loss(images, torch.zeros(BATCH, dtype=torch.long), given)
        assert loss.total.isfinite()
    for layer in given.attention if given else ():
        for part in (layer.queries, layer.keys):  # type: ignore[union-attr]
            found[part.untyped_storage().data_ptr()] = part.numel() * part.itemsize
    return sum(found.values()) / BATCH


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("scratch", {}),
        ("scratch", {"architecture": {"components": ("layer_scale",)}}),
        ("scratch", {"architecture": {"components": ("swiglu",)}}),
        ("copy", {}),
        ("distill", {}),
        ("distill", {"runs.run.layers": (1, 3)}),
    ],
)
def test_what_an_image_keeps(method: str, changes: dict[str, Any], precision: str) -> None:
    study = make(method, **changes, **{"training.precision": precision})
    formula = memory.of_run(study, "run", CLASSES).kept
    assert kept(study) == pytest.approx(formula, rel=0.07)


@pytest.mark.parametrize("method", ["scratch", "copy", "linear_probe"])
def test_what_each_parameter_takes(method: str) -> None:
    study = make(method)
    found = memory.of_run(study, "run", CLASSES)
    student = Subject(study, tiny_study.CPU, 1).method("run").student
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    assert found.parameters == sum(weight.numel() for weight in trained)
    assert found.saved == sum(weight.numel() for weight in student.parameters())
    optimizer = optimiser(student, study.runs["run"])
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel() > 1
    ]
    taken = sum(value.nbytes for value in [*trained, *(weight.grad for weight in trained), *states])  # type: ignore[union-attr, misc]
    ones = sum(weight.numel() == 1 for weight in trained)
    assert taken == pytest.approx(found.parameters * found.of_a_parameter, abs=8 * ones)
    assert found.fixed(1, sharded=False) == found.parameters * found.of_a_parameter + 4 * found.frozen


def test_sharding_shares_out_what_is_trained_and_keeps_the_teacher_whole() -> None:
    found = memory.Memory(1000, 500, True, True, 0, 0, 10, 1000)
    assert found.fixed(1, sharded=False) == 1000 * (4 + 4 + 8 + 4 + 2) + 500 * 4
    assert found.fixed(4, sharded=False) == 1000 * (4 + 4 + 8 + 4 + 4 + 2) + 500 * 4
    assert found.fixed(4, sharded=True) == 1000 * (4 + 4 + 8 + 4) // 4 + 2 * 10 * (8 + 2) + 500 * 4
