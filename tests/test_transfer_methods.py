"""The methods: what is trained, what is minimised, what stays frozen, and that every key of a run counts."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
from attention_transfer.models import attention as attention_access
from attention_transfer.models import constant_map, students, vit
from attention_transfer.models.attention import Attention, read
from attention_transfer.training import machine
from attention_transfer.transfer import attention_copy, attention_distill, methods
from attention_transfer.transfer.losses import attention_cross_entropy
from attention_transfer.transfer.maps import Maps, fitted
from attention_transfer.transfer.method import Given, Needs
from attention_transfer.transfer.teacher_source import (
    Averaged,
    AveragedOverExamples,
    CachedTeacher,
    OnlineTeacher,
    is_cached,
    teacher_attention,
    teacher_bias,
    teacher_maps,
)

DEPTH, WIDTH, CLASSES = 3, 16, 4
ARCHITECTURE: dict[str, Any] = {
    "patch_size": 4, "width": WIDTH, "depth": DEPTH, "heads": 2, "mlp_ratio": 2.0,
}  # fmt: skip
ALL = (0, 1, 2)
TRANSFER = ("copy", "distill")
LAYERED = (*TRANSFER, "distill_features")
TAUGHT = (*LAYERED, "distill_logits")
every_method = pytest.mark.parametrize("name", tiny_study.METHODS)


def arguments(classes: int) -> vit.Arguments:
    architecture = config.Architecture(**ARCHITECTURE)
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


def make_tutor() -> VisionTransformer:
    return sharpen(vit.create(arguments(CLASSES), seed=5), 5)


def make_method(name: str, layers: tuple[int, ...] = ALL, **options: Any) -> Any:
    """A method around a fresh student, as the stage `train` makes it."""
    changes = {f"teachers.{teacher}.architecture": ARCHITECTURE for teacher in ("first", "second")}
    if name in LAYERED:
        changes["runs.run.layers"] = layers
    study = tiny_study.make_study(name, {**changes, **{f"runs.run.{k}": v for k, v in options.items()}})
    student = students.create(
        arguments(CLASSES),
        seed=2,
        drop_path=study.runs["run"].drop_path,
        teacher=make_teacher() if name in ("finetune", "linear_probe") else None,
        copied_layers=methods.slimmed_layers(study, "run"),
    )
    return methods.build(study, "run", sharpen(student, 2))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 8, 8, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


def given_of(method: Any, images: Tensor, teacher: VisionTransformer | None = None) -> Given | None:
    """What the teacher says about the images, as far as the method needs it."""
    if method.needs is None:
        return None
    if teacher is None:
        teacher = make_tutor() if method.needs.what == "logits" else make_teacher()
    return OnlineTeacher(teacher, method.needs, "float32")(images, np.arange(len(images)), 0)


def loss_of(name: str, layers: tuple[int, ...] = ALL, **options: Any) -> tuple[Any, Any]:
    method = make_method(name, layers, **options)
    method.train()
    images, labels = batch()
    return method, method.loss(images, labels, given_of(method, images))


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
    loss.transfer.backward()
    for layer, block in enumerate(method.student.blocks):
        gradient = block.attn.qkv.weight.grad
        assert gradient[:WIDTH].abs().max() > 0, f"queries of layer {layer}"
        assert gradient[WIDTH : 2 * WIDTH].abs().max() > 0, f"keys of layer {layer}"
    assert method.student.blocks[-1].attn.qkv.weight.grad[2 * WIDTH :].abs().max() == 0  # no later map
    assert method.student.head.weight.grad is None


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teacher_is_frozen_in_eval_mode_and_without_gradient(name: str) -> None:
    method = make_method(name)
    teacher = (make_tutor() if name == "distill_logits" else make_teacher()).train()
    before = copy.deepcopy(teacher.state_dict())
    images, labels = batch()
    method.train()
    given = given_of(method, images, teacher)
    method.loss(images, labels, given).total.backward()
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
    logits = method.logits(method.student, images, given_of(method, images))
    assert loss.task.item() == pytest.approx(naive_cross_entropy(logits, labels, smoothing), rel=1e-5)
    if not name.startswith("distill"):
        assert loss.total is loss.task
        assert loss.transfer is None


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
    assert loss.transfer.item() == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == pytest.approx(loss.task.item() + weight * expected, rel=1e-5)


@pytest.mark.parametrize("layers", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_a_copy_students_maps_are_the_teachers_in_its_layers_alone(layers: tuple[int, ...]) -> None:
    method = make_method("copy", layers)
    images, _ = batch()
    teacher = make_teacher().eval()
    with torch.no_grad(), read(teacher, ALL) as expected:
        teacher(images)
    with torch.no_grad(), read(method.student, ALL) as found:
        method.logits(method.student.eval(), images, given_of(method, images))
    for layer in ALL:
        equal = torch.allclose(found[layer].map(), expected[layer].map(), atol=1e-6)
        assert equal == (layer in layers), f"layer {layer}"


@pytest.mark.parametrize("name", TAUGHT)
def test_what_the_teacher_says_of_other_images_changes_the_loss(name: str) -> None:
    method = make_method(name)
    method.train()
    images, labels = batch()
    right, wrong = given_of(method, images), given_of(method, batch(1)[0])
    losses = [method.loss(images, labels, given).total.item() for given in (right, wrong)]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("name", TAUGHT)
def test_a_method_without_what_it_needs_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="needs the teacher's"):
        make_method(name).loss(*batch(), None)


@every_method
def test_predictions_are_those_of_the_student_that_is_given(name: str) -> None:
    method = make_method(name)
    images, _ = batch()
    assert method.teacher_at_inference == (name == "copy")
    attention = given_of(method, images) if method.teacher_at_inference else None
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
    source = OnlineTeacher(teacher, Needs("values", layers), dtype)
    given = source(images, np.arange(6), 0).attention
    assert len(given) == len(layers)
    for layer, attention in zip(layers, given, strict=True):
        assert isinstance(attention, Attention)
        for part in ("queries", "keys"):
            exact = getattr(found[layer], part)
            expected = exact.to(getattr(torch, dtype)).float()
            assert torch.equal(getattr(attention, part), expected)
            assert torch.equal(expected, exact) == (dtype == "float32")  # the rounding does something
        assert attention.values is not None
        assert torch.equal(attention.values, found[layer].values)
    rows = teacher_attention(teacher, images, layers)
    assert rows.shape == (6, 2, len(layers), 2, 5, WIDTH // 2)
    for index, layer in enumerate(layers):
        assert torch.equal(rows[:, 0, index], found[layer].queries)
        assert torch.equal(rows[:, 1, index], found[layer].keys)


def test_layers_above_the_last_one_that_is_needed_are_not_computed() -> None:
    teacher = make_teacher()
    teacher.blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("the last layer ran"))
    OnlineTeacher(teacher, Needs("attention", (0, 1)), "float32")(batch()[0], np.arange(6), 0)


@pytest.mark.parametrize(
    ("content", "what", "serves"),
    [
        ("queries_and_keys", "attention", True),
        ("queries_and_keys", "queries_and_keys", True),
        ("queries_and_keys", "values", False),
        ("queries_and_keys", "features", False),
        ("maps", "attention", True),
        ("maps", "queries_and_keys", False),
        ("maps", "logits", False),
    ],
)
def test_a_cache_serves_what_it_holds(content: Any, what: Any, serves: bool) -> None:
    reader: Any = SimpleNamespace(layout=SimpleNamespace(content=content))
    assert is_cached(Needs(what, (0,)), content) == serves
    if serves:
        CachedTeacher(reader, Needs(what, (0,)))
    else:
        with pytest.raises(ValueError, match=f"a cache of {content} holds no {what}"):
            CachedTeacher(reader, Needs(what, (0,)))


def test_features_are_the_residual_stream_behind_each_block() -> None:
    teacher, (images, labels) = make_teacher().eval(), batch()
    seen: dict[int, Tensor] = {}
    for layer, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda _m, _i, out, layer=layer: seen.__setitem__(layer, out))
    found = OnlineTeacher(teacher, Needs("features", (0, 2)), "float32")(images, np.arange(6), 0).features
    assert [feature.shape for feature in found] == [(6, 5, WIDTH)] * 2
    for layer, feature in zip((0, 2), found, strict=True):
        assert torch.equal(feature, seen[layer])
    # The student's part of the loss: the same stream, and the logits of an ordinary pass.
    method, loss = loss_of("distill_features", (0, 2), feature_loss={"weight": 0.7, "reduction": "sum"})
    own: dict[int, Tensor] = {}
    for layer, block in enumerate(method.student.blocks):
        block.register_forward_hook(lambda _m, _i, out, layer=layer: own.__setitem__(layer, out))
    logits = method.student(images)
    expected = sum(((own[k] - f).double() ** 2).mean().item() for k, f in zip((0, 2), found, strict=True))
    assert loss.transfer.item() == pytest.approx(expected, rel=1e-5)
    assert loss.task.item() == pytest.approx(naive_cross_entropy(logits, labels, 0.1), rel=1e-5)
    assert loss.total.item() == pytest.approx(loss.task.item() + 0.7 * expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_are_distilled_as_hinton_says(temperature: float) -> None:
    options = {"weight": 0.5, "temperature": temperature, "teacher": "tutor"}
    method, loss = loss_of("distill_logits", logit_loss=options)
    images, _ = batch()
    with torch.no_grad():
        theirs, own = make_tutor().eval()(images).double(), method.student(images).double()
    p, q = ((logits / temperature).softmax(dim=1) for logits in (theirs, own))
    expected = -(p * q.log()).sum(dim=1).mean().item() * temperature**2
    assert loss.transfer.item() == pytest.approx(expected, rel=1e-4)
    assert loss.total.item() == pytest.approx(loss.task.item() + 0.5 * expected, rel=1e-4)


PARTS = {"query": "queries", "key": "keys", "value": "values"}


@pytest.mark.parametrize("heads", ["all", (1,)], ids=str)
@pytest.mark.parametrize("part", [*PARTS, "map"])
def test_copy_hands_over_the_parts_and_heads_that_are_named(part: str, heads: Any) -> None:
    """The block's values, mixed by hand from both networks' parts, against what the block passes on."""
    method = make_method("copy", (1,), transfer=part, heads=heads)
    images, _ = batch()
    teacher, student = make_teacher().eval(), method.student.eval()
    with torch.no_grad(), read(teacher, (1,)) as theirs:
        teacher(images)
    passed: list[Tensor] = []
    student.blocks[1].attn.proj.register_forward_pre_hook(lambda _m, inputs: passed.append(inputs[0]))
    slim = part == "map" and heads == "all"
    assert hasattr(student.blocks[1].attn, "qkv") == (not slim)
    tokens: list[Tensor] = []
    student.blocks[1].norm1.register_forward_hook(lambda _m, _i, out: tokens.append(out))
    with torch.no_grad():
        method.logits(student, images, given_of(method, images))
        if slim:
            values = student.blocks[1].attn.value(tokens[0])
            own = {"values": values.view(6, 5, 2, 8).transpose(1, 2)}
        else:
            qkv = student.blocks[1].attn.qkv(tokens[0]).view(6, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
            own = dict(zip(PARTS.values(), qkv, strict=True))
    for head in range(2):
        taken = {"queries", "keys"} if part == "map" else {PARTS[part]}
        copied = heads == "all" or head in heads
        q, k, v = (
            (getattr(theirs[1], name) if copied and name in taken else own[name])[:, head].double()
            for name in PARTS.values()
        )
        expected = (q @ k.mT / 8**0.5).softmax(dim=-1) @ v
        found = passed[0].view(6, 5, 2, 8)[:, :, head].double()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", ["all", (1,)], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_distill_of_a_part_is_its_mean_squared_difference(part: str, heads: Any) -> None:
    method, loss = loss_of("distill", (0, 2), transfer=part, heads=heads)
    images, _ = batch()
    teacher = make_teacher().eval()
    with torch.no_grad(), read(teacher, ALL) as theirs, read(method.student, ALL) as own:
        teacher(images)
        method.student(images)
    chosen = [0, 1] if heads == "all" else list(heads)
    expected = sum(
        ((getattr(theirs[k], PARTS[part]) - getattr(own[k], PARTS[part]))[:, chosen].double() ** 2)
        .mean()
        .item()
        for k in (0, 2)
    )
    assert loss.transfer.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distill_of_some_heads_at_a_temperature(temperature: float) -> None:
    method, loss = loss_of(
        "distill",
        (0, 1),
        heads_per_layer=((1,), (0,)),
        attention_loss={"weight": 1.0, "temperature": temperature},
    )
    images, _ = batch()
    teacher = make_teacher().eval()
    with torch.no_grad(), read(teacher, ALL) as theirs, read(method.student, ALL) as own:
        teacher(images)
        method.student(images)
    expected = 0.0
    for layer, head in ((0, 1), (1, 0)):
        t, s = ((x[layer].logits()[:, head].double() / temperature).softmax(dim=-1) for x in (theirs, own))
        expected += -(t * s.log()).sum(dim=-1).mean().item()
    assert loss.transfer.item() == pytest.approx(expected, rel=1e-5)
    loss.transfer.backward()
    gradient = method.student.blocks[1].attn.qkv.weight.grad.view(3, 2, 8, WIDTH)
    assert gradient[:2, 0].abs().max() > 0
    assert gradient[:2, 1].abs().max() == 0  # of the head that is not transferred


@pytest.mark.parametrize("over", ["queries", "heads", "layers"])
def test_averages_are_means_of_the_maps(over: str) -> None:
    images, _ = batch()
    teacher = make_teacher().eval()
    found = Averaged(OnlineTeacher(teacher, Needs("attention", (0, 2)), "float32"), over)(  # type: ignore[arg-type]
        images, np.arange(6), 0
    )
    with torch.no_grad(), read(teacher, ALL) as own:
        teacher(images)
    maps = np.stack([own[k].map().double().numpy() for k in (0, 2)])  # layers, batch, heads, queries, keys
    axis = {"layers": 0, "heads": 2, "queries": 3}[over]
    expected = np.broadcast_to(maps.mean(axis=axis, keepdims=True), maps.shape)
    for index, attention in enumerate(found.attention):
        np.testing.assert_allclose(attention.map().numpy(), expected[index], atol=1e-6)


def test_the_average_over_examples_does_not_depend_on_the_batch() -> None:
    teacher = make_teacher().eval()
    source = OnlineTeacher(teacher, Needs("attention", (0, 2)), "float32")
    images = torch.cat([batch(seed)[0] for seed in range(3)])
    pieces = [(images[at], np.arange(18)[at], 0) for at in (slice(0, 4), slice(4, 18))]
    averaged = AveragedOverExamples(source, pieces)
    with torch.no_grad(), read(teacher, ALL) as own:
        teacher(images)
    for count in (1, 5):
        found = averaged(images[:count], np.arange(count), 7).attention
        for layer, attention in zip((0, 2), found, strict=True):
            expected = own[layer].map().double().mean(dim=0, keepdim=True).expand(count, -1, -1, -1)
            torch.testing.assert_close(attention.map().double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("theirs", "own"), [(4, 2), (2, 4), (6, 3), (4, 4)])
def test_maps_fit_another_number_of_heads_by_groups(theirs: int, own: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, theirs, 5, 4, generator=generator)
    attention = Attention(queries, keys)
    for given in (attention, Maps(attention.map())):
        found = fitted(given, own).map()
        for head in range(own):
            group = (
                range(head * theirs // own, (head + 1) * theirs // own)
                if theirs > own
                else [head * theirs // own]
            )
            expected = attention.map()[:, list(group)].mean(dim=1)
            torch.testing.assert_close(found[:, head], expected)
    with pytest.raises(ValueError, match="one number must divide the other"):
        fitted(attention, 5 * theirs + 1)


# Every key of a run counts: trained by the stage `train` itself, once with and once without the change.

EVERY = tuple(tiny_study.METHODS)
BODY = ("scratch", "finetune", *TAUGHT)
CHANGES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("runs.run.teacher", "second", EVERY),
    ("runs.run.architecture", {**tiny_study.ARCHITECTURE, "mlp_ratio": 3.0}, ("scratch", *TAUGHT)),
    ("runs.run.architecture", {**tiny_study.ARCHITECTURE, "heads": 1}, TRANSFER),
    ("runs.run.initial", "first", ("scratch", *TAUGHT)),
    ("runs.run.transfer", "query", TRANSFER),
    ("runs.run.transfer", "key", TRANSFER),
    ("runs.run.transfer", "value", TRANSFER),
    ("runs.run.heads", (0,), TRANSFER),
    ("runs.run.heads_per_layer", ((0,), (0, 1)), TRANSFER),
    ("runs.run.average", "examples", TRANSFER),
    ("runs.run.average", "queries", TRANSFER),
    ("runs.run.average", "heads", TRANSFER),
    ("runs.run.average", "layers", TRANSFER),
    ("runs.run.feature_loss", {"weight": 2.0}, ("distill_features",)),
    ("runs.run.feature_loss", {"weight": 1.0, "reduction": "sum"}, ("distill_features",)),
    ("runs.run.logit_loss", {"weight": 2.0, "teacher": "tutor"}, ("distill_logits",)),
    ("runs.run.logit_loss", {"weight": 1.0, "temperature": 3.0, "teacher": "tutor"}, ("distill_logits",)),
    ("runs.run.logit_loss", {"weight": 1.0, "teacher": "other"}, ("distill_logits",)),
    ("runs.run.layers", (0,), LAYERED),
    ("runs.run.layers", (1,), LAYERED),
    ("runs.run.attention_loss", {"weight": 2.0}, ("distill",)),
    ("runs.run.attention_loss", {"weight": 3.0, "reduction": "mean"}, ("distill",)),
    ("runs.run.attention_loss", {"weight": 3.0, "temperature": 2.0}, ("distill",)),
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
    ("runs.run.shares_stochastic_depth", True, TRANSFER),
    ("runs.run.ema", 0.5, EVERY),
    ("views.per_image", 3, ("scratch", "distill")),
    ("views.crop_scale", (0.2, 1.0), ("scratch",)),
    ("views.crop_ratio", (0.5, 2.0), ("scratch",)),
    ("views.flip", 0.0, ("scratch",)),
    ("views.erase", 0.9, ("scratch",)),
    ("views.erase_with", "noise", ("scratch",)),
    ("views.rand_augment", "rand-m9-n2", ("scratch",)),
    ("views.mixup", 0.8, EVERY),
    ("views.cutmix", 1.0, ("scratch", "copy")),
    ("attention.dtype", "float32", TRANSFER),
    ("attention.dtype", "int8", TRANSFER),
    ("attention.content", "maps", TRANSFER),
    ("training.precision", "bfloat16", EVERY),
    ("training.clip_norm", 0.01, EVERY),
    ("data.seed", 1, ("scratch",)),
]

DEEP = {
    "teachers.deep": {
        "kind": "untrained",
        "architecture": {**tiny_study.ARCHITECTURE, "depth": 3},
        "seed": 5,
    },
    "runs.run.teacher": "deep",
}

Train = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny_study.write_inputs(folder)
    tiny_study.write_teacher(folder, tiny_study.make_study("distill", DEEP), "deep")
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
    for name, section in (
        ("attention_loss", config.AttentionLoss),
        ("feature_loss", config.FeatureLoss),
        ("logit_loss", config.LogitLoss),
    ):
        parts = [value for key, value, _ in CHANGES if key.endswith(name)]
        assert {key for value in parts for key in value} == set(section.model_fields)


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
    beside = {
        "runs.run.heads_per_layer": {"runs.run.layers": (0, 1)},  # what `all` means here
        "views.erase_with": {"views.erase": 0.9},
        # The first layer drops nothing, and what the last one drops comes behind its map.
        "runs.run.shares_stochastic_depth": {**DEEP, "runs.run.drop_path": 0.5},
    }.get(key, {})
    assert differ(train(name, beside), train(name, {**beside, key: value}))


def test_every_method_trains_other_weights(train: Train) -> None:
    trained = {name: train(name) for name in tiny_study.METHODS}
    for first, second in itertools.combinations(trained, 2):
        assert differ(trained[first], trained[second]), (first, second)


@pytest.mark.parametrize("key", ["training.validate_every", "training.curve_images", "attention.budget_gb"])
def test_a_key_that_must_not_change_the_weights_does_not(key: str, train: Train) -> None:
    value = 0.5 if key.endswith("gb") else 1
    assert not differ(train("distill"), train("distill", {key: value}))


HEADS_PER_LAYER = {"runs.run.layers": (0, 1), "runs.run.heads_per_layer": ((0,), (0, 1))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes", "recorded"),
    [
        ("scratch", {}, {}),
        ("copy", {}, {"copied_layers": "materialised"}),
        ("copy", {"runs.run.heads": (0,)}, {"layers_of_copied_heads": "fused"}),
        (
            "copy",
            {"runs.run.heads": (0,), "runs.run.architecture": {**tiny_study.ARCHITECTURE, "width": 32}},
            {"layers_of_copied_heads": "materialised"},
        ),
        ("copy", HEADS_PER_LAYER, {"copied_layers": "materialised", "layers_of_copied_heads": "fused"}),
        ("copy", {"runs.run.transfer": "query"}, {}),
        ("copy", {"runs.run.average": "queries"}, {"copied_layers": "maps"}),
        ("copy", {"attention.content": "maps"}, {"copied_layers": "maps"}),
        (
            "copy",
            {"runs.run.architecture": {**tiny_study.ARCHITECTURE, "heads": 1}},
            {"copied_layers": "maps"},
        ),
        ("distill", {}, {"attention_loss": "joint"}),
        ("distill", {"runs.run.heads": (0,)}, {"attention_loss": "streamed"}),
        (
            "distill",
            {"runs.run.attention_loss": {"weight": 3.0, "reduction": "sum", "temperature": 2.0}},
            {"attention_loss": "streamed"},
        ),
        ("distill", {"attention.content": "maps"}, {"attention_loss": "maps"}),
        ("distill", {"runs.run.average": "heads"}, {"attention_loss": "maps"}),
        ("distill", {"runs.run.transfer": "key"}, {}),
    ],
)
def test_the_recorded_paths_are_those_that_run(
    method: str,
    changes: dict[str, Any],
    recorded: dict[str, str],
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study, taken = tiny_study.make_study(method, changes), set[str]()
    assert methods.paths(study, "run", device="cpu") == recorded

    def spied(function: Callable[..., Tensor], name: Callable[[Tensor], str]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            result = function(*arguments, **options)
            if (result[0] if isinstance(result, tuple) else result).requires_grad:  # in a training step
                taken.add(name(arguments[0]))
            return result

        return call

    def constant(queries: Tensor) -> str:
        return constant_map.path("cpu", *queries.shape[-2:])

    for module, function, name in (
        (attention_access, "mixed_by_constant_map", constant),
        (Maps, "apply", lambda _: "maps"),
        (attention_distill, "streamed_attention_cross_entropy", lambda _: "streamed"),
        (attention_distill, "attention_and_cross_entropy", lambda _: "joint"),
        (attention_distill, "map_cross_entropy", lambda _: "maps"),
    ):
        monkeypatch.setattr(module, function, spied(getattr(module, function), name))
    one_call = attention_copy._one_call

    def spied_one_call(teacher: Attention | Maps, own: Attention) -> bool:
        if (one := one_call(teacher, own)) and own.values.requires_grad:  # type: ignore[union-attr]
            taken.add("fused")
        return one

    monkeypatch.setattr(attention_copy, "_one_call", spied_one_call)
    tiny_study.train(study)
    assert taken == set(recorded.values())


def test_a_bias_is_told_apart_from_queries_and_keys() -> None:
    """With it they are all of the map; a plain teacher has none."""
    beit = Beit(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, use_rel_pos_bias=True
    ).eval()
    with torch.no_grad():
        for block in beit.blocks:
            block.attn.relative_position_bias_table.normal_()
    images, layers = batch()[0], (0, 1)
    bias = teacher_bias(beit, images[:1], layers)
    assert bias is not None
    assert bias.shape == (2, 2, 5, 5)
    queries, keys = teacher_attention(beit, images, layers).unbind(dim=1)
    maps = (queries @ keys.mT / queries.shape[-1] ** 0.5 + bias).softmax(dim=-1)
    torch.testing.assert_close(maps, teacher_maps(beit, images, layers))
    assert teacher_bias(make_teacher(), images[:1], layers) is None
