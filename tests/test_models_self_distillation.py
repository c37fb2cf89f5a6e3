"""DINO against a float64 loop over images and prototypes, and by what happens without its two safeguards."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import tiny_pretraining as tiny
import torch
from torch import Tensor, nn

from attention_transfer.models.projections import pooled
from attention_transfer.models.self_distillation import PrototypeHead, SelfDistillation

pytestmark = pytest.mark.slow  # it trains

KINDS = list(tiny.ENCODERS)
PROTOTYPES, SCHEDULE = 32, 1000
STEPS, RATE = 50, 6e-3  # fast enough for a collapse, where there is one


def make(
    kind: str = "plain",
    *,
    teacher_temperature: float = 0.04,
    centre_momentum: float = 0.9,
    base_momentum: float = 0.97,
    **changed: Any,
) -> SelfDistillation:
    encoder = tiny.make_encoder(kind, **changed)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SelfDistillation(
            encoder,
            hidden_width=32,
            bottleneck_width=16,
            prototypes=PROTOTYPES,
            student_temperature=0.1,
            teacher_temperature=teacher_temperature,
            centre_momentum=centre_momentum,
            base_momentum=base_momentum,
            steps=SCHEDULE,
        )


def different_teacher(model: SelfDistillation) -> SelfDistillation:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.centre.copy_(0.1 * torch.randn(PROTOTYPES, generator=generator))
    return model


def naive_cosines(head: Any, encoder: Any, images: Tensor) -> tiny.Floats:
    rows = tiny.naive_pool(encoder, images)
    for layer in head.bottleneck:
        if isinstance(layer, nn.Linear):
            rows = rows @ tiny.array(layer.weight).T + tiny.array(layer.bias)
        else:
            rows = np.array([[x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in row] for row in rows])
    prototypes = tiny.array(head.prototypes.weight)
    return np.array([
        [row @ one / np.linalg.norm(row) / np.linalg.norm(one) for one in prototypes] for row in rows
    ])  # fmt: skip


def naive_softmax(row: tiny.Floats) -> tiny.Floats:
    return np.exp(row) / np.exp(row).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_the_paper(kind: str) -> None:
    model = different_teacher(make(kind))
    views = tiny.make_images(seed=1), tiny.make_images(seed=2)
    centre = tiny.array(model.centre).copy()
    found = model(*views).item()
    student = [naive_cosines(model.head, model.encoder, view) for view in views]
    teacher = [naive_cosines(model.teacher.projector, model.teacher.encoder, view) for view in views]
    terms = []
    for of_teacher, of_student in ((0, 1), (1, 0)):
        for told, answered in zip(teacher[of_teacher], student[of_student], strict=True):
            target = naive_softmax((told - centre) / 0.04)
            terms.append(-(target * np.log(naive_softmax(answered / 0.1))).sum())
    assert found == pytest.approx(np.mean(terms), rel=1e-4)
    expected = 0.9 * centre + 0.1 * np.concatenate(teacher).mean(axis=0)
    np.testing.assert_allclose(tiny.array(model.centre), expected, atol=1e-6)


def test_last_layer_is_one_with_weight_norm_of_gain_one() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(6, hidden_width=8, bottleneck_width=5, prototypes=7)
    layer = nn.Linear(5, 7, bias=False)
    layer.weight = copy.deepcopy(head.prototypes.weight)
    layer = nn.utils.parametrizations.weight_norm(layer, dim=0)
    nn.init.ones_(layer.parametrizations.weight.original0)  # type: ignore[union-attr, index, arg-type]
    features = torch.randn(3, 6)
    bottleneck = nn.functional.normalize(head.bottleneck(features), dim=1)
    torch.testing.assert_close(head(features), layer(bottleneck))
    assert head(features).shape == (3, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_is_trained_gets_a_gradient(kind: str) -> None:
    model = make(kind)
    assert tiny.without_gradient(model, model(*tiny.two_views(0))) == set()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_a_training_step_moves_teacher_and_centre_and_evaluation_neither() -> None:
    model = make(base_momentum=0.5)
    assert torch.equal(model.centre, torch.zeros(PROTOTYPES))
    tiny.train(model, tiny.two_views, range(1), learning_rate=RATE)
    student, before = model.head.prototypes.weight, copy.deepcopy(model.teacher.projector.prototypes.weight)  # type: ignore[union-attr]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert state["centre"].abs().min() > 0
    model.eval()
    model(*tiny.two_views(1))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.train()
    model(*tiny.two_views(1))
    share = 1 - model.teacher.momentum(1)
    expected = before + share * (student - before)  # type: ignore[operator]
    torch.testing.assert_close(model.teacher.projector.prototypes.weight, expected)  # type: ignore[union-attr]
    assert not torch.equal(model.centre, state["centre"])
    assert model.teacher.step.item() == 2


def test_the_centre_is_the_closed_form_of_all_batches() -> None:
    model = make(base_momentum=1.0)
    means = []
    for step in range(4):
        model(*tiny.two_views(step))
        with torch.no_grad():
            means.append(tiny.array(torch.cat(model.teacher(tiny.two_views(step)))).mean(axis=0))
    expected = sum(0.1 * 0.9 ** (3 - step) * mean for step, mean in enumerate(means))
    np.testing.assert_allclose(tiny.array(model.centre), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_bit(kind: str) -> None:
    tiny.assert_resumes_to_the_bit(lambda: make(kind, depth=2, drop_path_rate=0.3), tiny.two_views)


def test_loss_falls() -> None:
    losses = tiny.train(make(base_momentum=0.9), tiny.two_views, range(40), learning_rate=1e-3)
    assert np.mean(losses[-3:]) < 0.6 * losses[0], losses


def outputs(model: SelfDistillation) -> tuple[Tensor, float]:
    """The student's cosines of fresh images, and how many nats the teacher's choice tells of an image.

    The latter is the entropy of the mean over images less the mean entropy: 0 in a collapse of either kind.
    """
    images, _ = tiny.structured(64, seed=999)
    model.eval()
    with torch.no_grad():
        cosines = model.head(pooled(model.encoder, images))
        choice = ((model.teacher([images])[0] - model.centre) / model.teacher_temperature).softmax(dim=1)
    entropy = torch.special.entr
    return cosines, float(entropy(choice.mean(dim=0)).sum() - entropy(choice).sum(dim=1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_collapse(kind: str) -> None:
    model = make(kind)
    tiny.train(model, tiny.two_views, range(STEPS), learning_rate=RATE)
    cosines, information = outputs(model)
    assert tiny.spread(cosines) > 0.5
    assert information > 0.7  # of log(8) = 2.1 for eight patterns


@pytest.mark.parametrize(
    ("teacher_temperature", "centre_momentum"),
    [(0.04, 1.0), (1.0, 0.9), (1.0, 1.0)],
    ids=["without centring", "without sharpening", "without both"],
)
def test_it_collapses(teacher_temperature: float, centre_momentum: float) -> None:
    """The centre stays zero with a momentum of 1."""
    model = make(teacher_temperature=teacher_temperature, centre_momentum=centre_momentum)
    tiny.train(model, tiny.two_views, range(STEPS), learning_rate=RATE)
    cosines, information = outputs(model)
    assert tiny.spread(cosines) < 0.25
    assert information < 0.05


def test_bfloat16_is_for_the_networks_and_not_for_the_loss() -> None:
    model, views = make(teacher_temperature=0.1), tiny.two_views(0)
    expected = model.eval()(*views)
    with torch.autocast("cpu", torch.bfloat16):
        cosines = model.head(torch.randn(2, tiny.WIDTH))
        loss = model(*views)
    assert (cosines.dtype, loss.dtype) == (torch.float32, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert not torch.equal(loss, expected)  # the networks did run in bfloat16
    assert tiny.without_gradient(model, loss) == set()


def test_unsound_arguments_are_refused() -> None:
    for arguments, message in (
        ({"teacher_temperature": 0.0}, "teacher_temperature: expected a positive number, got 0.0"),
        ({"centre_momentum": 1.5}, r"centre_momentum: expected a number in \[0, 1\], got 1.5"),
        ({"base_momentum": -0.1}, "base_momentum: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="views: expected one shape"):
        make()(tiny.make_images(4), tiny.make_images(6))
    assert (SelfDistillation.views, SelfDistillation.labelled) == (2, False)
