"""Whole training steps under the paper's recipe against its equations, written out here in plain float64 tensors.

The student and its training are made by the project from presets/imagenet1k.yaml, at toy size. The views of single
images, their order, the partners and boxes of mixing and the masks of stochastic depth are the project's draws, which
have tests of their own; everything that is computed from them is computed again here: mixing, both networks, the
hand-over of maps, losses, the schedule, AdamW and the average of the weights. Gradients are autograd's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from attention_transfer import config, draws, fitting
from attention_transfer.assembly import Parts
from attention_transfer.config import Study
from attention_transfer.data import mixing
from attention_transfer.data.labelled import LabelledViews
from attention_transfer.data.rendering import CleanImages, Render
from attention_transfer.layout import Layout
from attention_transfer.models import vit
from attention_transfer.training.batches import order, paired

PRESET = Path(__file__).parents[1] / "presets" / "imagenet1k.yaml"
DEPTH, WIDTH, HEADS, PATCH, CLASSES = 3, 16, 4, 4, 3
HEAD_DIM = (
    WIDTH // HEADS
)  # a power of 4, as ViT-L's 64 is not: its root is a power of 2, exact in every format
ARCHITECTURE = {"patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp_ratio": 2.0}
EPOCHS, WARMUP_EPOCHS, IMAGES, BATCH, VIEWS = 3, 1.0, 24, 12, 2
STEPS_PER_EPOCH = IMAGES // BATCH
CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-11}
"""Adam divides each gradient by its own size, and so makes the rounding of a small one large."""


@dataclass(frozen=True)
class Case:
    """A run of the preset, at this file's size.

    Attributes:
        distilled: of 3 layers: the first 2, as 18 of 24.
        shares: whether the teacher drops what the student drops; only the last layer's map can tell.
    """

    method: str
    distilled: tuple[int, ...] = (0, 1)
    shares: bool = False


CASES = {
    "copy": Case("copy"),
    "distill": Case("distill"),
    "copy, shared depth": Case("copy", shares=True),
    "distill, shared depth": Case("distill", (0, 1, 2), shares=True),
}


# --- what the project does


class InFloat64(Parts):
    """Images, targets and teacher in float64, so that rounding hides nothing."""

    @functools.cached_property
    def labelled(self) -> LabelledViews:
        plain = super().labelled
        return Targets(**{**vars(plain), "single": Doubled(plain.single)})

    def clean(self, pixels: Any) -> CleanImages:
        plain = super().clean(pixels)
        return CleanImages(Doubled(plain.render), plain.device)

    def teacher(self, name: str) -> vit.ViT:
        return super().teacher(name).double()


@dataclass
class Doubled:
    """The same views."""

    single: Render

    def __call__(self, rows: np.ndarray, view: int) -> Tensor:
        return self.single(rows, view).double()

    def begin(self, rows: np.ndarray, view: int) -> None:
        self.single.begin(rows, view)


class Targets(LabelledViews):
    def targets(self, rows: np.ndarray, view: int) -> Tensor:
        return super().targets(rows, view).double()


@dataclass
class Step:
    """What the project made of one step."""

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    kept: list[Tensor]


@dataclass
class Training:
    """What it made of them all."""

    study: Study
    parts: Parts
    first: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)


class Silent:
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...


def small(case: Case) -> Study:
    """The preset's run with its recipe, on the tiny study's images and a teacher of this file's size."""
    preset = config.load(PRESET)
    run = preset.runs[case.method].model_dump()
    run |= {"teacher": "first", "epochs": EPOCHS, "warmup_epochs": WARMUP_EPOCHS, "batch_size": BATCH}
    if case.method == "distill":
        run["layers"] = case.distilled
    if case.shares:
        run |= {"drop_path": 0.2, "shares_stochastic_depth": True}
    return tiny_study.make_study(
        case.method,
        {
            "runs.run": run,
            "views.mixup": preset.views.mixup,
            "views.cutmix": preset.views.cutmix,
            "attention.dtype": preset.attention.dtype,
            "training.clip_norm": preset.training.clip_norm,
            "teachers.first.architecture": ARCHITECTURE,
        },
    )


def train(case: Case, folder: Path, patch: pytest.MonkeyPatch) -> Training:
    tiny_study.write_inputs(folder)
    patch.chdir(folder)
    study, layout = small(case), Layout("tiny")
    tiny_study.write_teacher(folder, study, "first")
    done = Training(study, InFloat64(study, layout, tiny_study.CPU))
    kept: list[Tensor] = []
    student: list[Any] = []

    def create(*args: Any, **options: Any) -> Any:
        student.append(made(*args, **options).double())
        done.first.update({name: weight.detach().clone() for name, weight in student[0].named_parameters()})
        return student[0]

    def of_examples(count: int, draw: Callable[[int], Tensor]) -> Tensor:
        kept.append(drawn(count, draw))
        return kept[-1]

    def stepped(*_: Any) -> None:
        named = dict(student[0].named_parameters())
        gradients = {name: weight.grad.clone() for name, weight in named.items()}
        weights = {name: weight.detach().clone() for name, weight in named.items()}
        done.steps.append(Step(gradients, weights, list(kept)))
        kept.clear()

    made, drawn = fitting.students.create, draws.of_examples
    patch.setattr(fitting.students, "create", create)
    patch.setattr(draws, "of_examples", of_examples)
    watching = register_optimizer_step_post_hook(stepped)
    try:
        model, history, _ = fitting.fit_student(
            done.parts, "run", 0, checkpoints=Path("none"), sink=Silent(), label="x", where="x"
        )
    finally:
        watching.remove()
    done.rows, done.average = history.rows, dict(model.state_dict())
    return done


# --- what the paper says


def batch(parts: Parts, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """Images and classes' shares of a step: pairs of views blended, or one with a box of the other."""
    mixer, view = parts.labelled.mixing, epoch % VIEWS
    assert mixer is not None
    mix = mixing.draw(mixer, view)
    rows = paired(order(IMAGES, seed=0, epoch=epoch), mix.partners)[step * BATCH : (step + 1) * BATCH]
    images, targets = [], []
    for row in rows:
        partner, share, box = mix.partners[row], mix.shares[row], mix.boxes[row]
        own, other = parts.labelled.single(np.array([row, partner]), view)
        # Shares are float32, the partner's as well as its own: so they are here, and all that follows is not.
        rest = np.float32(1) - share
        if box.any():
            top, bottom, left, right = box
            own = own.clone()
            own[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            images.append(own)
        else:
            images.append(float(share) * own + float(rest) * other)
        target = np.zeros(CLASSES, np.float32)
        target[parts.labelled.labels[row]] += share
        target[parts.labelled.labels[partner]] += rest
        targets.append(torch.from_numpy(target).double())
    return torch.stack(images), torch.stack(targets)


Weights = Mapping[str, Tensor]


def linear(weights: Weights, name: str, tokens: Tensor) -> Tensor:
    return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, tokens: Tensor) -> Tensor:
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def by_head(tokens: Tensor) -> Tensor:
    """(batch, tokens, width) to (batch, heads, tokens, head_dim)."""
    return tokens.reshape(*tokens.shape[:2], HEADS, HEAD_DIM).permute(0, 2, 1, 3)


def queries_keys_values(weights: Weights, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = linear(weights, f"blocks.{layer}.attn.qkv", tokens).split(WIDTH, dim=-1)
    return by_head(queries), by_head(keys), by_head(values)


def logits(queries: Tensor, keys: Tensor) -> Tensor:
    """S = q k^T / sqrt(d)."""
    return torch.einsum("bhqd,bhkd->bhqk", queries, keys) / math.sqrt(HEAD_DIM)


def softmax(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def log_softmax(scores: Tensor) -> Tensor:
    return scores - scores.exp().sum(dim=-1, keepdim=True).log()


Attend = Callable[[int, Tensor], Tensor]
"""From a layer and its normalised tokens to its values, mixed: (batch, heads, tokens, head_dim)."""
Keep = Callable[[int, int, Tensor], Tensor]
"""From a layer, its first or second branch, and what the branch adds, to what is added."""


def blocks(weights: Weights, images: Tensor, attend: Attend, keep: Keep) -> Tensor:
    """Dosovitskiy et al. (2021): the tokens behind the last block."""
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (batch, channels, rows, columns, ..)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    embedded = patches @ kernel.T + weights["patch_embed.proj.bias"]
    tokens = torch.cat([weights["cls_token"].expand(len(images), -1, -1), embedded], dim=1)
    tokens = tokens + weights["pos_embed"]
    for layer in range(DEPTH):
        name = f"blocks.{layer}"
        mixed = attend(layer, norm(weights, f"{name}.norm1", tokens)).permute(0, 2, 1, 3).flatten(2)
        tokens = tokens + keep(layer, 0, linear(weights, f"{name}.attn.proj", mixed))
        hidden = gelu(linear(weights, f"{name}.mlp.fc1", norm(weights, f"{name}.norm2", tokens)))
        tokens = tokens + keep(layer, 1, linear(weights, f"{name}.mlp.fc2", hidden))
    return tokens


def predictions(weights: Weights, tokens: Tensor) -> Tensor:
    """Mean of the patch tokens, LayerNorm, linear head."""
    return linear(weights, "head", norm(weights, "fc_norm", tokens[:, 1:].mean(dim=1)))


def dropping(kept: list[Tensor]) -> Keep:
    """Stochastic depth: from 0 in the first layer to 0.2 in the last (Huang et al., 2016), in timm's float32.

    Args:
        kept: 0 or 1 for each image, of both branches of every layer but the first; none for no stochastic depth.
    """
    places = [(layer, branch) for layer in range(1, DEPTH) for branch in (0, 1)]
    masks = dict(zip(places, kept, strict=True)) if kept else {}

    def keep(layer: int, branch: int, added: Tensor) -> Tensor:
        rate = float(np.float32(0.2 * layer / (DEPTH - 1)))
        return added * masks[layer, branch] / (1 - rate) if (layer, branch) in masks else added

    return keep


def teacher_maps(weights: Weights, images: Tensor, keep: Keep) -> list[Tensor]:
    """The teacher's maps of every layer, from queries and keys that went through float16."""
    maps: list[Tensor] = []

    def attend(layer: int, tokens: Tensor) -> Tensor:
        queries, keys, values = queries_keys_values(weights, layer, tokens)
        maps.append(softmax(logits(queries.half().double(), keys.half().double())))
        return softmax(logits(queries, keys)) @ values

    blocks(weights, images, attend, keep)
    return maps


def losses(
    case: Case, weights: Weights, batch: tuple[Tensor, Tensor], *, maps: list[Tensor], keep: Keep
) -> tuple[Tensor, Tensor]:
    """The task's, and the attention's summed over layers (zero for copy)."""
    images, targets = batch
    attention = torch.zeros((), dtype=torch.float64)

    def attend(layer: int, tokens: Tensor) -> Tensor:
        nonlocal attention
        if case.method == "copy":
            return maps[layer] @ by_head(linear(weights, f"blocks.{layer}.attn.value", tokens))
        queries, keys, values = queries_keys_values(weights, layer, tokens)
        scores = logits(queries, keys)
        if layer in case.distilled:
            attention = attention - (maps[layer] * log_softmax(scores)).sum(dim=-1).mean()
        return softmax(scores) @ values

    predicted = log_softmax(predictions(weights, blocks(weights, images, attend, keep)))
    smooth = 0.9 * targets + 0.1 / CLASSES
    return -(smooth * predicted).sum(dim=-1).mean(), attention


@dataclass(frozen=True)
class Recipe:
    """The paper's table, at this file's size."""

    rate: float
    smallest: float
    layer_decay: float
    weight_decay: float
    betas: tuple[float, float]


RECIPES = {
    "copy": Recipe(8e-3, 2e-3, 0.75, 0.05, (0.9, 0.999)),
    "distill": Recipe(8e-4, 1e-6, 1.0, 0.3, (0.9, 0.95)),
}
ATTENTION_WEIGHT = 3.0
AVERAGE = 0.9999


def rate(recipe: Recipe, step: int) -> float:
    """Linear from 0, then half a cosine."""
    warmup, total = round(WARMUP_EPOCHS * STEPS_PER_EPOCH), EPOCHS * STEPS_PER_EPOCH
    if step < warmup:
        return recipe.rate * step / warmup
    done = (step - warmup) / (total - warmup)
    return recipe.smallest + (recipe.rate - recipe.smallest) * (1 + math.cos(math.pi * done)) / 2


def depth_of(name: str) -> int:
    """0 for the embeddings, then a number for each block, and one more for the head."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return DEPTH + 1 if name.startswith(("fc_norm.", "head.")) else 0


class AdamW:
    """Loshchilov and Hutter (2019), without decay of biases, norms and what is added to the tokens."""

    def __init__(self, recipe: Recipe, weights: dict[str, Tensor]) -> None:
        self.recipe, self.weights, self.steps = recipe, weights, 0
        self.first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        (beta1, beta2), lr = self.recipe.betas, rate(self.recipe, self.steps)
        self.steps += 1
        for name, gradient in gradients.items():
            own = lr * self.recipe.layer_decay ** (DEPTH + 1 - depth_of(name))
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradient
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradient**2
            mean = self.first[name] / (1 - beta1**self.steps)
            size = (self.second[name] / (1 - beta2**self.steps)).sqrt()
            decays = gradient.ndim > 1 and name not in ("cls_token", "pos_embed")
            weight = self.weights[name] * (1 - own * self.recipe.weight_decay * decays)
            self.weights[name] = weight - own * mean / (size + 1e-8)


@pytest.mark.parametrize("run", CASES)
def test_training_is_what_the_papers_equations_say(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[run]
    done = train(case, tmp_path, monkeypatch)
    teacher = {name: value.double() for name, value in done.parts.teacher("first").state_dict().items()}
    assert len(done.steps) == EPOCHS * STEPS_PER_EPOCH
    optimiser = AdamW(RECIPES[case.method], dict(done.first))
    average: dict[str, Tensor] = {}
    seen: list[tuple[float, float]] = []
    for number, found in enumerate(done.steps):
        images, targets = batch(done.parts, *divmod(number, STEPS_PER_EPOCH))
        weights = {name: weight.clone().requires_grad_() for name, weight in optimiser.weights.items()}
        own = found.kept[-2 * (DEPTH - 1) :]  # what the student drew, behind what the teacher did
        maps = teacher_maps(teacher, images, dropping(own if case.shares else []))
        task, attention = losses(case, weights, (images, targets), maps=maps, keep=dropping(own))
        total = task + ATTENTION_WEIGHT * attention
        total.backward()
        seen.append((task.item(), attention.item()))
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        assert gradients.keys() == found.gradients.keys()
        optimiser.step(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, **CLOSE)
            torch.testing.assert_close(found.weights[name], optimiser.weights[name], **CLOSE)
        for name, weight in optimiser.weights.items():
            # timm's average begins with the weights after the second step.
            average[name] = AVERAGE * average[name] + (1 - AVERAGE) * weight if number > 1 else weight
    for name, weight in average.items():
        torch.testing.assert_close(done.average[name], weight, rtol=1e-10, atol=1e-13)
    for epoch, row in enumerate(done.rows):
        tasks, attentions = np.array(seen[epoch * STEPS_PER_EPOCH :][:STEPS_PER_EPOCH]).mean(axis=0)
        assert row["task_loss"] == pytest.approx(tasks, rel=1e-12)
        assert row["total"] == pytest.approx(tasks + ATTENTION_WEIGHT * attentions, rel=1e-12)
        assert row.get("attention_loss", 0.0) == pytest.approx(attentions, rel=1e-12)


def test_the_steps_show_all_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the comparison is one: both ways of mixing, dropped branches, maps that differ, weights that move."""
    done = train(CASES["distill"], tmp_path, monkeypatch)
    mixer = done.parts.labelled.mixing
    assert mixer is not None
    boxes = mixing.draw(mixer, 0).boxes.any(axis=1)
    assert boxes.any()
    assert not boxes.all()
    assert all(len(step.kept) == 2 * (DEPTH - 1) for step in done.steps)  # the first layer drops nothing
    assert any((mask == 0).any() for step in done.steps for mask in step.kept)
    teacher = {name: value.double() for name, value in done.parts.teacher("first").state_dict().items()}
    maps = torch.stack(teacher_maps(teacher, batch(done.parts, 0, 0)[0], dropping([])))
    assert maps.std(dim=-1).mean() > 0.05
    assert all(torch.equal(done.steps[0].weights[name], weight) for name, weight in done.first.items())
    assert all(not torch.equal(done.steps[1].weights[name], weight) for name, weight in done.first.items())
