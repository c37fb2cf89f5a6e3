"""Every family of docs/teachers.md, small and with random weights: teacher, attention, students that learn."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch
from release_files import images, native
from test_models_published import arguments, tokens

from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.models import published, releases, students, timm_entries, vit, weights_of_timm
from attention_transfer.models.attention import hand_over, read
from attention_transfer.models.tokens import token_layout
from attention_transfer.transfer import methods
from attention_transfer.transfer.teacher_source import Aligned, OnlineTeacher

WRITER = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "teachers.py"))
ENTRIES = sorted({name.partition(".")[0] for name in WRITER["FAMILIES"].values()})
every_entry = pytest.mark.parametrize("entry", ENTRIES)
GREY = ((0.3,), (0.35,))
CLASSES = 3


def size_of(entry: str) -> int:
    return 28 if "patch14" in entry else 32


def teacher_of(entry: str) -> Any:
    """A small teacher with random weights, fitted to grey images as a published one is."""
    original = native(entry, img_size=size_of(entry))
    encoder = {k: v for k, v in original.state_dict().items() if not k.startswith(releases.NOT_ENCODER)}
    given = arguments(entry, size=size_of(entry), channels=1)
    found = published.fit(encoder, given, trained=releases.IMAGENET, study=GREY, where=Path("w"))
    return found.model.eval().requires_grad_(False)


def architecture(entry: str, *, plain: bool = False) -> dict[str, Any]:
    """As params.yaml would state it, but for the sizes, which are small."""
    stated = timm_entries.described(entry).architecture.model_dump()
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 4.0}
    kept = {"patch_size": stated["patch_size"], **({"class_token": False} if "class_token" in stated else {})}
    return {**kept, **sizes} if plain else {**stated, **sizes}


def study_of(method: str, entry: str, *, plain: bool) -> Study:
    teacher = {"kind": "untrained", "architecture": architecture(entry), "seed": 0}
    second = {"kind": "untrained", "architecture": architecture(entry, plain=True), "seed": 0}
    changes = {"data.image_size": size_of(entry), "teachers.first": teacher, "teachers.second": second}
    if plain:
        changes["runs.run.architecture"] = architecture(entry, plain=True)
    return tiny_study.make_study(method, changes)


@every_entry
def test_attention_is_read_and_handed_back(entry: str) -> None:
    teacher, pixels = teacher_of(entry), images(size=size_of(entry), channels=1)
    with torch.no_grad():
        expected = teacher(pixels)
        with read(teacher, (0, 1)) as found:
            assert torch.equal(teacher(pixels), expected)
        with hand_over(teacher, found):
            torch.testing.assert_close(teacher(pixels), expected, rtol=1e-4, atol=1e-5)
    stated = study_of("copy", entry, plain=False).teachers["first"].architecture
    layout = token_layout(teacher)
    assert (layout.class_token, layout.registers) == (stated.class_token, stated.registers)
    assert found[0].queries.shape == (2, 2, stated.tokens(size_of(entry)), 8)
    assert (found[0].bias is not None) == ("relative_bias" in stated.components)


@every_entry
@pytest.mark.parametrize("kind", ["matched", "plain"])
@pytest.mark.parametrize("method", ["copy", "distill"])
def test_students_learn_from_it(method: str, kind: str, entry: str) -> None:
    """One step of the real method: the loss is finite, and what is handed over reaches the student."""
    teacher, size = teacher_of(entry), size_of(entry)
    study = study_of(method, entry, plain=kind == "plain")
    if kind == "matched":
        given = arguments(entry, size=size, channels=1)
        given = vit.Arguments(entry, {**given.values, "num_classes": CLASSES})
    else:
        given = vit.model_arguments(study.architecture("run"), image_size=size, channels=1, classes=CLASSES)
    student = students.create(
        given, seed=1, drop_path=0.0, teacher=None, copied_layers=methods.slimmed_layers(study, "run")
    )
    built = methods.build(study, "run", student)
    assert built.needs is not None
    source: Any = OnlineTeacher(teacher, built.needs, "float32", "queries_and_keys")
    theirs, own = vit.tokens(study, "run")
    assert theirs == token_layout(teacher)
    assert own == token_layout(student)
    if theirs != own:
        source = Aligned(source, theirs, own)
    pixels, labels = images(size=size, channels=1), torch.tensor([0, 2])
    built.train()
    optimiser = torch.optim.SGD([weight for weight in student.parameters() if weight.requires_grad], lr=0.05)
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    losses = []
    for _ in range(2):
        loss = built.loss(pixels, labels, source(pixels, np.arange(2), 0))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        losses.append(float(loss.total.detach()))
    assert np.isfinite(losses).all()
    assert losses[1] < losses[0]
    still = [name for name, weight in student.named_parameters() if torch.equal(weight, before[name])]
    assert not [name for name in still if "blocks" in name and "proj.weight" in name]


@every_entry
def test_a_matched_student_is_pooled_by_mean_and_saved_as_timms(entry: str, tmp_path: Path) -> None:
    given = arguments(entry, size=size_of(entry), channels=1)
    given = vit.Arguments(entry, {**given.values, "num_classes": CLASSES})
    student = vit.create(given, seed=1).eval()
    pixels = images(size=size_of(entry), channels=1)
    with torch.no_grad():
        patches = tokens(student, pixels)[:, token_layout(student).prefix :]
        expected = student.head(student.fc_norm(patches.mean(dim=1)))
        torch.testing.assert_close(student(pixels), expected, rtol=1e-4, atol=1e-5)
        vit.save(tmp_path, student, given)
        assert torch.equal(vit.load(tmp_path, made_by="train")(pixels), student(pixels))
    assert isinstance(student.head, torch.nn.Linear)


@pytest.mark.slow  # it builds all of them in full size, without storage
def test_the_page_is_that_of_timm() -> None:
    assert WRITER["PAGE"].read_text(encoding="utf-8") == WRITER["page"](), "run: python docs/teachers.py"


def test_stated_sizes_are_those_that_timm_builds() -> None:
    right = timm_entries.described("vit_small_patch14_reg4_dinov2").architecture
    given = vit.model_arguments(right, image_size=28, channels=3, classes=4)
    assert given.values["img_size"] == 28
    wrong = right.model_copy(update={"heads": 8, "components": ("layer_scale",)})
    with pytest.raises(StudyError) as caught:
        vit.model_arguments(wrong, image_size=28, channels=3, classes=4)
    assert "heads 6, not 8" in caught.value.problem
    assert right.flow() in caught.value.remedy


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("vit_base_patch16_xp_224", "its attention is no module of its own"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled cannot get a mean pool"),
        ("vit_base_patch14_dino2", "is no entry of timm"),
        ("flexivit_small", "rules of their own"),
        ("resnet18", "ResNet cannot get a mean pool"),
        ("vit_large_patch16_sapiens2", "its heads share keys and values"),
    ],
)
def test_what_cannot_be_served_is_said(entry: str, says: str) -> None:
    with pytest.raises(StudyError, match=says) as caught:
        timm_entries.described(entry)
    assert entry in caught.value.where


def test_names_of_timm_are_known_without_a_network() -> None:
    found = weights_of_timm.tagged("vit_large_patch16_224.mae", where="")
    assert (found.entry, found.image_size, found.images) == ("vit_large_patch16_224", 224, releases.IMAGENET)
    for name in ("vit_large_patch16_224.moe", "vit_huge_patch99_224.mae"):
        with pytest.raises(StudyError, match="is no published model of timm"):
            weights_of_timm.tagged(name, where="params.yaml: teachers.x.name")
