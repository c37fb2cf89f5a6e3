"""Components of other families (paper B): models that timm reads, and attention that goes between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import tiny_study
import torch
from pydantic import ValidationError
from timm.layers import GluMlp, SwiGLU

from attention_transfer.assembly import Parts
from attention_transfer.config import Architecture, Component
from attention_transfer.data import views
from attention_transfer.files import read_json
from attention_transfer.models import students, vit
from attention_transfer.models.attention import hand_over, read
from attention_transfer.models.attention_families import attention_modules
from attention_transfer.models.tokens import token_layout
from attention_transfer.teaching import teacher_source
from attention_transfer.transfer import methods
from attention_transfer.transfer.maps import Maps
from attention_transfer.transfer.method import Given

COMPONENTS: tuple[Component, ...] = get_args(Component)
SETS: tuple[tuple[Component, ...], ...] = (
    (),
    *((component,) for component in COMPONENTS),
    ("layer_scale", "registers"),
    ("layer_scale", "swiglu", "relative_bias"),
    ("rotary", "swiglu", "registers", "qk_norm", "pre_norm", "layer_scale"),
)
every_set = pytest.mark.parametrize("components", SETS, ids="+".join)


def architecture(components: tuple[Component, ...]) -> Architecture:
    return Architecture(**tiny_study.ARCHITECTURE, components=components)


def make_arguments(components: tuple[Component, ...], classes: int = 3) -> vit.Arguments:
    return vit.model_arguments(architecture(components), image_size=8, channels=1, classes=classes)


def make_images() -> torch.Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


SIGNS: dict[Component, Callable[[Any, set[str]], bool]] = {
    "layer_scale": lambda model, weights: any("gamma" in name for name in weights),
    "registers": lambda model, weights: model.num_prefix_tokens == 5,
    "rotary": lambda model, weights: getattr(model, "rope", None) is not None,
    "relative_bias": lambda model, weights: any("relative_position_bias" in name for name in weights),
    "swiglu": lambda model, weights: type(model.blocks[0].mlp) in (GluMlp, SwiGLU),
    "pre_norm": lambda model, weights: any(name.startswith("norm_pre.") for name in weights),
    "qk_norm": lambda model, weights: any("attn.q_norm." in name for name in weights),
}
"""How a model's own parts and weights show a component."""


@every_set
def test_a_model_has_the_components_that_it_is_given_and_no_others(components: tuple[Component, ...]) -> None:
    model = vit.create(make_arguments(components), seed=0)
    weights = set(model.state_dict())
    assert {component for component in COMPONENTS if SIGNS[component](model, weights)} == set(components)
    assert token_layout(model).registers == architecture(components).registers
    assert token_layout(model).tokens == architecture(components).tokens(8)
    assert len(attention_modules(model)) == tiny_study.DEPTH


def test_a_gated_mlp_has_as_many_weights_as_the_plain_one() -> None:
    wide = {**tiny_study.ARCHITECTURE, "width": 96, "heads": 4, "mlp_ratio": 4.0}
    sizes = []
    for components in ((), ("swiglu",)):
        arguments = vit.model_arguments(
            Architecture(**wide, components=components), image_size=8, channels=1, classes=3
        )
        model = vit.create(arguments, seed=0)
        sizes.append(sum(weight.numel() for weight in model.blocks[0].mlp.parameters()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


@every_set
def test_models_pool_the_patches_and_start_with_heads_of_one_size(components: tuple[Component, ...]) -> None:
    model = vit.create(make_arguments(components), seed=0).eval()
    tokens = model.forward_features(make_images())
    patches = tokens[:, 1 + architecture(components).registers :]
    pooled = model.fc_norm(patches.mean(dim=1))
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    assert 0.01 < float(model.head.weight.detach().std()) < 0.03


@every_set
def test_timm_opens_what_was_saved(components: tuple[Component, ...], tmp_path: Path) -> None:
    model = vit.create(make_arguments(components), seed=1).eval()
    vit.save(tmp_path, model, make_arguments(components))
    config = read_json(tmp_path / vit.CONFIG, made_by="train")
    by_timm = timm.create_model(
        config["architecture"],
        checkpoint_path=tmp_path / vit.WEIGHTS,
        num_classes=config["num_classes"],
        **config["model_args"],
    ).eval()
    folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    ours = vit.load(tmp_path, made_by="train")
    with torch.no_grad():
        expected = model(make_images())
        for loaded in (by_timm, folder, ours):
            assert torch.equal(loaded(make_images()), expected)


@every_set
def test_a_model_handed_its_own_attention_gives_its_own_output(
    components: tuple[Component, ...], tmp_path: Path
) -> None:
    model = vit.create(make_arguments(components), seed=1).eval()
    layers = tuple(range(tiny_study.DEPTH))
    with torch.no_grad():
        with read(model, layers) as found:
            expected = model(make_images())
        slimmed = students.create(
            make_arguments(components), seed=1, drop_path=0.0, teacher=None, copied_layers=layers
        )
        students.save(tmp_path, slimmed, make_arguments(components), layers)
        for student in (slimmed.eval(), students.load(tmp_path, made_by="train")):
            with hand_over(student, found):
                torch.testing.assert_close(student(make_images()), expected)


@pytest.mark.parametrize(
    "components",
    [
        ("relative_bias", "registers"),
        ("relative_bias", "rotary"),
        ("swiglu", "swiglu"),
    ],
)
def test_components_that_no_model_has_together_are_refused(components: tuple[Component, ...]) -> None:
    with pytest.raises(ValidationError, match="components"):
        architecture(components)


def test_rotary_embedding_needs_a_head_that_it_can_turn() -> None:
    with pytest.raises(ValidationError, match="multiple of 4"):
        Architecture(patch_size=4, width=12, depth=1, heads=2, mlp_ratio=2.0, components=("rotary",))


def test_a_masked_autoencoder_refuses_components() -> None:
    from attention_transfer.config import MaskedAutoencoder

    with pytest.raises(ValidationError, match="pre-trained by mae"):
        MaskedAutoencoder(
            kind="mae", architecture=architecture(("layer_scale",)), decoder={"width": 8, "depth": 1, "heads": 2},
            mask_ratio=0.5, epochs=2, warmup_epochs=1.0, batch_size=4, learning_rate=0.1, weight_decay=0.0,
            crop_scale=(0.5, 1.0), seed=0,
        )  # fmt: skip


def test_a_student_may_not_have_registers_that_its_teacher_lacks() -> None:
    with pytest.raises(ValidationError, match="registers have no counterparts"):
        make_parts("distill", (), ("registers",))


def make_parts(
    method: str, teacher: tuple[Component, ...], student: tuple[Component, ...], **attention: str
) -> Parts:
    changes: dict[str, Any] = {
        "teachers.first.architecture": {**tiny_study.ARCHITECTURE, "components": teacher},
        "runs.run.architecture": {**tiny_study.ARCHITECTURE, "components": student},
    }
    changes |= {f"attention.{key}": value for key, value in attention.items()}
    return tiny_study.make_parts(tiny_study.make_study(method, changes))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_study.write_inputs(tmp_path)
    return tmp_path


def save_teacher(parts: Parts) -> vit.ViT:
    """One whose maps are far from uniform."""
    arguments = parts.teacher_arguments("first")
    teacher = vit.create(arguments, seed=3).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, weight in teacher.named_parameters():
            if "attn.q" in name or "relative_position_bias" in name:
                weight.normal_(std=0.5)
    vit.save(parts.layout.teacher("first"), teacher, arguments)
    return teacher


@pytest.mark.slow
@pytest.mark.parametrize("matched", [False, True], ids=["plain", "matched"])
@pytest.mark.parametrize("content", ["queries_and_keys", "maps"])
@every_set
def test_cached_and_online_attention_agree_for_every_family(
    components: tuple[Component, ...], content: str, matched: bool, folder: Path
) -> None:
    """And they are the teacher's own maps, between the tokens that the student has."""
    own = components if matched else ()
    online, cached = (
        make_parts("distill", components, own, source=source, content=content, dtype="float32")
        for source in ("online", "cache")
    )
    teacher = save_teacher(online)
    tiny_study.script("cache").write(cached, "first", "validation")
    method = methods.build(online.study, "run", vit.create(online.student_arguments("run"), seed=0))
    images, examples = online.evaluated("validation")
    batch = online.clean(images.images)(np.arange(len(images)))
    found: list[Given] = []
    for parts in (online, cached):
        source = teacher_source(parts, "run", "validation", method.needs)
        assert source is not None
        found.append(source(batch, examples, views.CLEAN))
    dropped = 0 if matched else architecture(components).registers
    with torch.no_grad(), read(teacher, range(tiny_study.DEPTH)) as attention:
        teacher(batch)
    for layer in range(tiny_study.DEPTH):
        first, second = (given.attention[layer] for given in found)
        torch.testing.assert_close(first.map(), second.map(), atol=1e-6, rtol=1e-5)
        assert isinstance(first, Maps) == (content == "maps")
        whole = attention[layer].map()
        kept = [0, *range(1 + dropped, whole.shape[-1])]
        expected = whole[..., kept, :][..., kept]
        torch.testing.assert_close(
            first.map(), expected / expected.sum(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("matched", [False, True], ids=["plain", "matched"])
@pytest.mark.parametrize("name", ["copy", "distill"])
@every_set
def test_a_student_of_every_family_learns_from_its_teacher(
    components: tuple[Component, ...], name: str, matched: bool, folder: Path
) -> None:
    """All of its weights get a gradient; a distilled student's loss falls to that of equal maps."""
    own = components if matched else ()
    parts = make_parts(name, components, own, source="online", dtype="float32")
    save_teacher(parts)
    student = students.create(
        parts.student_arguments("run"),
        seed=0,
        drop_path=0.0,
        teacher=None,
        copied_layers=methods.slimmed_layers(parts.study, "run"),
    )
    method = methods.build(parts.study, "run", student)
    source = teacher_source(parts, "run", "views", method.needs)
    assert source is not None
    images = parts.labelled
    rows = np.arange(8)
    batch = images.render(rows, 0)
    given = source(batch, images.examples[rows], 0)
    method.train()
    loss = method.loss(batch, torch.from_numpy(images.labels[rows]), given)
    loss.total.backward()
    without = [name for name, weight in student.named_parameters() if weight.grad is None]
    assert without == []
    if name == "distill":
        equal = -torch.stack(
            [(layer.map() * layer.map().log()).sum(dim=-1).mean() for layer in given.attention]
        ).sum()
        assert loss.transfer is not None
        excess = float(loss.transfer.detach() - equal)
        assert excess > 0
        optimiser = torch.optim.Adam(student.parameters(), lr=0.02)
        for _ in range(60):
            optimiser.zero_grad()
            loss = method.loss(batch, torch.from_numpy(images.labels[rows]), given)
            assert loss.transfer is not None
            loss.transfer.backward()
            optimiser.step()
        assert -1e-5 < float(loss.transfer.detach() - equal) < excess / 4
