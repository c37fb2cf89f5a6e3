"""Attention of a teacher for the tokens of a student, against softmax over the tokens that are left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models import VisionTransformer
from tiny_vits import FAMILIES, TINY, capture, make, make_images
from torch import Tensor, nn

from attention_transfer.errors import StudyError
from attention_transfer.models.attention import Attention, hand_over
from attention_transfer.models.tokens import TokenLayout, token_layout
from attention_transfer.transfer.token_layout import align, align_maps, counterparts

LAYOUTS = st.builds(
    TokenLayout, st.booleans(), st.integers(0, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))
)


@st.composite
def fitting(draw: st.DrawFn) -> tuple[TokenLayout, TokenLayout]:
    """A teacher, and a student that has no token which the teacher lacks."""
    teacher = draw(LAYOUTS)
    class_token = teacher.class_token and draw(st.booleans())
    return teacher, TokenLayout(class_token, draw(st.sampled_from([0, teacher.registers])), teacher.grid)


def random_attention(tokens: int, seed: int, bias_shape: tuple[int, ...] | None) -> Attention:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bias = None if bias_shape is None else draw(*(tokens if size == 0 else size for size in bias_shape))
    return Attention(draw(2, 3, tokens, 4), draw(2, 3, tokens, 4), bias, 0.7, draw(2, 3, tokens, 5))


def names(layout: TokenLayout) -> list[str]:
    """Every token by its name; equal names are counterparts."""
    registers = [f"register {i}" for i in range(layout.registers)]
    patches = [f"patch {row} {column}" for row in range(layout.grid[0]) for column in range(layout.grid[1])]
    return ["class"] * layout.class_token + registers + patches


@given(fitting())
def test_counterparts_have_the_same_name(pair: tuple[TokenLayout, TokenLayout]) -> None:
    teacher, student = pair
    assert [names(teacher)[place] for place in counterparts(teacher, student)] == names(student)
    assert len(names(student)) == student.tokens


@given(
    fitting(), st.integers(0, 99), st.sampled_from([None, (1, 3, 0, 0), (2, 1, 1, 0), (0, 1), (2, 3, 1, 1)])
)
def test_aligned_attention_is_softmax_over_the_tokens_that_are_left(
    pair: tuple[TokenLayout, TokenLayout], seed: int, bias_shape: tuple[int, ...] | None
) -> None:
    teacher, student = pair
    attention = random_attention(teacher.tokens, seed, bias_shape)
    logits = np.einsum("bhqd,bhkd->bhqk", attention.queries.numpy(), attention.keys.numpy()) * 0.7
    if attention.bias is not None:
        logits = logits + attention.bias.numpy()
    left = [names(teacher).index(name) for name in names(student)]
    weights = np.exp(logits[..., left, :][..., left])
    expected = weights / weights.sum(-1, keepdims=True)
    aligned = align(attention, teacher, student)
    np.testing.assert_allclose(aligned.map().numpy(), expected, rtol=1e-12)
    assert aligned.values is not None
    assert attention.values is not None
    assert torch.equal(aligned.values, attention.values[..., left, :])
    # A map that has been made already: rows and columns go, and the rest is renormalised.
    np.testing.assert_allclose(align_maps(attention.map(), teacher, student).numpy(), expected, rtol=1e-12)


@given(LAYOUTS, LAYOUTS)
def test_either_every_token_has_its_counterpart_or_the_student_is_refused(
    teacher: TokenLayout, student: TokenLayout
) -> None:
    fits = (
        teacher.grid == student.grid
        and student.class_token <= teacher.class_token
        and student.registers in (0, teacher.registers)
    )
    if fits:
        assert [names(teacher)[place] for place in counterparts(teacher, student)] == names(student)
    else:
        with pytest.raises(StudyError, match=r"counterpart|different parts"):
            counterparts(teacher, student)


@pytest.mark.parametrize(
    ("teacher", "student", "reason"),
    [
        (TokenLayout(True, 0, (2, 2)), TokenLayout(True, 0, (2, 3)), "different parts of the image"),
        (TokenLayout(False, 0, (2, 2)), TokenLayout(True, 0, (2, 2)), "class token has no counterpart"),
        (TokenLayout(True, 0, (2, 2)), TokenLayout(True, 4, (2, 2)), "registers have no counterparts"),
        (TokenLayout(True, 4, (2, 2)), TokenLayout(True, 2, (2, 2)), "registers have no counterparts"),
    ],
)
def test_a_refusal_names_the_reason_and_both_layouts(
    teacher: TokenLayout, student: TokenLayout, reason: str
) -> None:
    with pytest.raises(StudyError, match=reason) as refusal:
        align_maps(torch.zeros(1, 1, teacher.tokens, teacher.tokens), teacher, student)
    assert str(teacher) in str(refusal.value)
    assert str(student) in str(refusal.value)


def test_equal_layouts_are_left_alone() -> None:
    layout = TokenLayout(True, 1, (2, 2))
    attention = random_attention(6, 0, None)
    assert align(attention, layout, layout) is attention


def test_a_row_without_weight_on_the_students_tokens_is_refused() -> None:
    teacher, student = TokenLayout(True, 0, (1, 2)), TokenLayout(False, 0, (1, 2))
    maps = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0.5, 0.25, 0.25]])
    with pytest.raises(StudyError, match="no weight"):
        align_maps(maps, teacher, student)


def test_attention_of_other_tokens_is_refused() -> None:
    layout = TokenLayout(True, 0, (2, 2))
    for call in (
        lambda: align(random_attention(6, 0, None), layout, layout),
        lambda: align_maps(torch.ones(6, 6), layout, layout),
    ):
        with pytest.raises(StudyError, match="expected attention between 5 tokens"):
            call()


PREFIXES = {
    "SigLIP": (False, 0),
    "DeiT distilled": (True, 1),
    "DINOv2 with registers": (True, 2),
    "DINOv3": (True, 2),
    "ViT with relative positions": (False, 0),
    "ViT with relative positions by MLP": (False, 0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_of_a_model_is_that_of_its_attention(family: str) -> None:
    model = make(family)
    layout = token_layout(model)
    assert layout == TokenLayout(*PREFIXES.get(family, (True, 0)), (2, 2))
    assert capture(model, make_images())[0].queries.shape[-2] == layout.tokens


def test_rows_and_columns_of_the_grid_are_told_apart() -> None:
    model = VisionTransformer(**TINY | {"img_size": (8, 16)})
    assert token_layout(model).grid == (2, 4)


def test_layouts_that_change_are_refused() -> None:
    with pytest.raises(TypeError, match="no fixed grid"):
        token_layout(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="drops patches"):
        token_layout(VisionTransformer(**TINY, patch_drop_rate=0.5))


def test_a_student_without_registers_can_be_handed_a_teachers_attention() -> None:
    images, teacher, student = make_images(), make("DINOv3"), make()
    layouts = token_layout(teacher), token_layout(student)
    given = {layer: align(found, *layouts) for layer, found in capture(teacher, images).items()}
    with torch.no_grad(), hand_over(student, given):
        assert student(images).isfinite().all()
