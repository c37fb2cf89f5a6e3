"""The methods: what is trained, what is minimised, what stays frozen, and that every key of a run counts."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch
from timm.models import VisionTransformer
from timm.models.beit import Beit
from torch import Tensor

from attention_transfer import config
from attention_transfer.config import Run
from attention_transfer.models import students, vit
from attention_transfer.models.attention import read
from attention_transfer.training import machine
from attention_transfer.transfer import methods
from attention_transfer.transfer.attention_source import OnlineAttention, teacher_attention
from attention_transfer.transfer.losses import attention_cross_entropy

DEPTH, WIDTH, CLASSES = 3, 16, 4
ALL = (0, 1, 2)
TRANSFER = ("copy", "distill")
every_method = pytest.mark.parametrize("name", tiny_study.METHODS)


def arguments(classes: int) -> dict[str, Any]:
    architecture = config.Architecture(patch_size=4, width=WIDTH, depth=DEPTH, heads=2, mlp_ratio=2.0)
    return vit.model_arguments(architecture, image_size=8, channels=1, classes=classes)


def sharpen(model: VisionTransformer, seed: int) -> VisionTransformer:
    """Gives the model maps and predictions that are far from uniform."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for block in model.blocks:
            if hasattr(block.attn, "qkv"):
                block.attn.qkv.weight.normal_(std=0.6)
        if model.num_classes:
            model.head.weight.normal_(std=0.5)
    return model


def make_teacher() -> VisionTransformer:
    return sharpen(vit.create(arguments(0), seed=1), 1)


def make_method(name: str, layers: tuple[int, ...] = ALL, **options: Any) -> Any:
    """A method around a fresh student, as the stage `train` makes it."""
    given = {"layers": layers} if name in TRANSFER else {}
    if name == "distill":
        given["attention_loss"] = options.pop("attention_loss", {"weight": 3.0})
    run = Run.model_validate(
        {
            "method": name,
            "teacher": "t",
            "learning_rate": 0.01,
            "epochs": 9,
            "batch_size": 4,
            **given,
            **options,
        }
    )
    student = students.create(
        arguments(CLASSES),
        seed=2,
        drop_path=run.drop_path,
        teacher=make_teacher() if name in ("finetune", "linear_probe") else None,
        copied_layers=layers if name == "copy" else (),
    )
    return methods.build(run, sharpen(student, 2), layers if name in TRANSFER else ())


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 8, 8, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


def attention_of(images: Tensor, layers: tuple[int, ...], name: str = "distill") -> Tensor | None:
    if name not in TRANSFER:
        return None
    return OnlineAttention(make_teacher(), layers, "float32")(images, np.arange(len(images)), 0)


def loss_of(name: str, layers: tuple[int, ...] = ALL, **options: Any) -> tuple[Any, Any]:
    method = make_method(name, layers, **options)
    method.train()
    images, labels = batch()
    return method, method.loss(images, labels, attention_of(images, layers, name))


@every_method
def test_gradient_reaches_every_weight_that_is_trained(name: str) -> None:
    method, loss = loss_of(name)
    loss.total.backward()
    reached = {
        n for n, p in method.student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    held = {n for n, _ in method.student.named_parameters()}
    head = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert head < held
    assert reached == (head if name == "linear_probe" else held)
    assert any(".qkv." in n for n in held) == (name != "copy")


@every_method
def test_training_changes_what_it_trains_and_nothing_else(name: str) -> None:
    method, loss = loss_of(name)
    before = {n: p.clone() for n, p in method.student.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in method.student.parameters() if p.requires_grad), lr=1.0)
    loss.total.backward()
    optimizer.step()
    changed = {n for n, p in method.student.state_dict().items() if not torch.equal(p, before[n])}
    if name == "linear_probe":
        assert changed == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    else:
        assert changed == set(before)


def test_the_attention_loss_reaches_queries_and_keys_of_every_layer() -> None:
    method, loss = loss_of("distill")
    loss.attention.backward()
    for layer, block in enumerate(method.student.blocks):
        gradient = block.attn.qkv.weight.grad
        assert gradient[:WIDTH].abs().max() > 0, f"queries of layer {layer}"
        assert gradient[WIDTH : 2 * WIDTH].abs().max() > 0, f"keys of layer {layer}"
    assert method.student.blocks[-1].attn.qkv.weight.grad[2 * WIDTH :].abs().max() == 0  # no later map
    assert method.student.head.weight.grad is None


@pytest.mark.parametrize("name", TRANSFER)
def test_the_teacher_is_frozen_in_eval_mode_and_without_gradient(name: str) -> None:
    teacher = make_teacher().train()
    before = copy.deepcopy(teacher.state_dict())
    source = OnlineAttention(teacher, ALL, "float16")
    method = make_method(name)
    images, labels = batch()
    method.train()
    attention = source(images, np.arange(6), 0)
    assert not attention.requires_grad
    method.loss(images, labels, attention).total.backward()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(value, before[n]) for n, value in teacher.state_dict().items())
    held = {id(p) for p in method.student.parameters()}
    assert not any(id(p) in held for p in teacher.parameters())


@every_method
def test_training_mode_is_that_of_what_is_trained(name: str) -> None:
    method = make_method(name)
    method.student.eval()
    method.train()
    assert method.student.training == (name != "linear_probe")


def test_a_linear_probe_runs_its_body_without_a_graph() -> None:
    method, loss = loss_of("linear_probe")
    names = {n for n, p in method.student.named_parameters() if p.requires_grad}
    assert names == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    again = method.loss(*batch(), None)
    assert torch.equal(loss.total, again.total)  # no stochastic depth, no dropout


def naive_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    losses = []
    for row, label in zip(logits.detach().double().numpy(), labels.tolist(), strict=True):
        log_p = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1 - smoothing
        losses.append(-(target * log_p).sum())
    return float(np.mean(losses))


@every_method
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_task_loss_is_smoothed_cross_entropy(name: str, smoothing: float) -> None:
    method, loss = loss_of(name, label_smoothing=smoothing)
    images, labels = batch()
    logits = method.logits(method.student, images, attention_of(images, ALL, name))
    assert loss.task.item() == pytest.approx(naive_cross_entropy(logits, labels, smoothing), rel=1e-5)
    if name != "distill":
        assert loss.total is loss.task
        assert loss.attention is None


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_distill_minimises_task_plus_weighted_attention_of_its_layers(
    weight: float, reduction: Any, layers: tuple[int, ...]
) -> None:
    method, loss = loss_of("distill", layers, attention_loss={"weight": weight, "reduction": reduction})
    images, _ = batch()
    teacher = make_teacher().eval()
    with torch.no_grad(), read(teacher, layers) as teachers, read(method.student, layers) as own:
        teacher(images)
        method.student(images)
    each = [
        attention_cross_entropy(teachers[k].logits()[None], own[k].logits()[None], reduction="sum").item()
        for k in layers
    ]
    expected = sum(each) / (1 if reduction == "sum" else len(layers))
    assert loss.attention.item() == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == pytest.approx(loss.task.item() + weight * expected, rel=1e-5)


@pytest.mark.parametrize("layers", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_a_copy_students_maps_are_the_teachers_in_its_layers_alone(layers: tuple[int, ...]) -> None:
    method = make_method("copy", layers)
    images, _ = batch()
    attention = attention_of(images, layers)
    teacher = make_teacher().eval()
    with torch.no_grad(), read(teacher, ALL) as expected:
        teacher(images)
    with torch.no_grad(), read(method.student, ALL) as found:
        method.logits(method.student.eval(), images, attention)
    for layer in ALL:
        equal = torch.allclose(found[layer].map(), expected[layer].map(), atol=1e-6)
        assert equal == (layer in layers), f"layer {layer}"


@pytest.mark.parametrize("name", TRANSFER)
def test_attention_of_other_images_changes_the_loss(name: str) -> None:
    method = make_method(name)
    method.train()
    images, labels = batch()
    right, wrong = attention_of(images, ALL), attention_of(batch(1)[0], ALL)
    losses = [method.loss(images, labels, attention).total.item() for attention in (right, wrong)]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("name", TRANSFER)
def test_a_missing_attention_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="needs the teacher's attention"):
        make_method(name).loss(*batch(), None)


@every_method
def test_predictions_are_those_of_the_student_that_is_given(name: str) -> None:
    method = make_method(name)
    images, _ = batch()
    assert method.teacher_at_inference == (name == "copy")
    attention = attention_of(images, ALL, name) if method.teacher_at_inference else None
    average = copy.deepcopy(method.student).eval()
    with torch.no_grad():
        average.head.weight.mul_(2.0)
        average.head.bias.fill_(1.0)
        own = method.logits(method.student.eval(), images, attention)
        given = method.logits(average, images, attention)
    torch.testing.assert_close(given - 1.0, 2 * (own - method.student.head.bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layers", [(1,), (0, 2)], ids=str)
def test_online_attention_is_the_teachers_rounded_once(dtype: Any, layers: tuple[int, ...]) -> None:
    teacher, (images, _) = make_teacher(), batch()
    with torch.no_grad(), read(teacher.eval(), layers) as found:
        teacher(images)
    attention = OnlineAttention(teacher, layers, dtype)(images, np.arange(6), 0)
    assert attention.dtype == torch.float32
    assert attention.shape == (6, 2, len(layers), 2, 5, WIDTH // 2)
    for index, layer in enumerate(layers):
        for part, exact in ((0, found[layer].queries), (1, found[layer].keys)):
            expected = exact.to(getattr(torch, dtype)).float()
            assert torch.equal(attention[:, part, index], expected)
            assert torch.equal(expected, exact) == (dtype == "float32")  # the rounding does something
    assert torch.equal(
        teacher_attention(teacher, images, layers).to(getattr(torch, dtype)).float(), attention
    )


# Every key of a run counts: trained by the stage `train` itself, once with and once without the change.

EVERY = tuple(tiny_study.METHODS)
BODY = ("scratch", "finetune", "copy", "distill")
CHANGES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("runs.run.teacher", "second", EVERY),
    ("runs.run.layers", (0,), TRANSFER),
    ("runs.run.layers", (1,), TRANSFER),
    ("runs.run.attention_loss", {"weight": 2.0}, ("distill",)),
    ("runs.run.attention_loss", {"weight": 3.0, "reduction": "mean"}, ("distill",)),
    ("runs.run.learning_rate", 0.02, EVERY),
    ("runs.run.min_learning_rate", 0.005, EVERY),
    ("runs.run.weight_decay", 0.5, EVERY),
    ("runs.run.betas", (0.8, 0.999), EVERY),
    ("runs.run.betas", (0.9, 0.9), EVERY),
    ("runs.run.layer_decay", 0.5, BODY),
    ("runs.run.epochs", 4, EVERY),
    ("runs.run.warmup_epochs", 2.0, EVERY),
    ("runs.run.batch_size", 6, EVERY),
    ("runs.run.label_smoothing", 0.0, EVERY),
    ("runs.run.drop_path", 0.5, BODY),
    ("runs.run.ema", 0.5, EVERY),
    ("views.per_image", 3, ("scratch", "distill")),
    ("views.crop_scale", (0.2, 1.0), ("scratch",)),
    ("views.crop_ratio", (0.5, 2.0), ("scratch",)),
    ("views.flip", 0.0, ("scratch",)),
    ("views.erase", 0.9, ("scratch",)),
    ("attention.dtype", "float32", TRANSFER),
    ("training.precision", "bfloat16", EVERY),
    ("training.clip_norm", 0.01, EVERY),
    ("data.seed", 1, ("scratch",)),
]

Train = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny_study.write_inputs(folder)
    return folder


@functools.cache
def _unchanged(method: str) -> dict[str, Tensor]:
    return tiny_study.train(tiny_study.make_study(method))[0]


@pytest.fixture
def train(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(machine, "prepare", lambda: tiny_study.CPU)
    return lambda method, changes=None: (
        tiny_study.train(tiny_study.make_study(method, changes))[0] if changes else _unchanged(method)
    )


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    for weights in (first, second):
        assert all(value.isfinite().all() for value in weights.values())
    return first.keys() != second.keys() or any(
        first[n].shape != second[n].shape or not torch.equal(first[n], second[n]) for n in first
    )


def test_every_key_of_a_run_is_among_the_changes() -> None:
    changed = {key.split(".")[2] for key, _, _ in CHANGES if key.startswith("runs.")}
    assert changed | {"method"} == set(Run.model_fields)
    parts = [value for key, value, _ in CHANGES if key.endswith("attention_loss")]
    assert {k for value in parts for k in value} == set(config.AttentionLoss.model_fields)


@pytest.mark.slow
@every_method
def test_training_twice_gives_the_same_weights(name: str, train: Train) -> None:
    torch.manual_seed(99)
    again = tiny_study.train(tiny_study.make_study(name))[0]
    assert not differ(train(name), again)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        pytest.param(name, key, value, id=f"{name}-{key.removeprefix('runs.run.')}={value}".replace(" ", ""))
        for key, value, names in CHANGES
        for name in names
    ],
)
def test_every_key_changes_the_trained_weights(name: str, key: str, value: Any, train: Train) -> None:
    assert differ(train(name), train(name, {key: value}))


def test_every_method_trains_other_weights(train: Train) -> None:
    trained = {name: train(name) for name in tiny_study.METHODS}
    for first, second in itertools.combinations(trained, 2):
        assert differ(trained[first], trained[second]), (first, second)


@pytest.mark.parametrize("key", ["training.validate_every", "training.curve_images", "attention.budget_gb"])
def test_a_key_that_must_not_change_the_weights_does_not(key: str, train: Train) -> None:
    value = 0.5 if key.endswith("gb") else 1
    assert not differ(train("distill"), train("distill", {key: value}))


def test_a_teacher_with_an_attention_bias_is_refused() -> None:
    beit = Beit(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, use_rel_pos_bias=True
    )
    with pytest.raises(TypeError, match="attention bias"):
        teacher_attention(beit.eval(), torch.zeros(1, 1, 8, 8), (0,))
