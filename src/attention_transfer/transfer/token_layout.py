"""A teacher's attention for the tokens of a student: patch to patch, class to class, without the registers.

Dropping a token removes its row, and its column too: what is left of a row is renormalised. For queries and
keys that is what taking the token's query and key away does, exactly: softmax over the keys that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_transfer.errors import StudyError
from attention_transfer.models.attention import Attention
from attention_transfer.models.tokens import TokenLayout


def counterparts(teacher: TokenLayout, student: TokenLayout) -> list[int]:
    """The teacher's token for each of the student's tokens, in the student's order.

    Raises:
        StudyError: a token of the student has no counterpart.
    """
    if teacher.grid != student.grid:
        raise _misfit("their patches show different parts of the image", teacher, student)
    if student.class_token and not teacher.class_token:
        raise _misfit("the student's class token has no counterpart", teacher, student)
    if student.registers not in (0, teacher.registers):
        # Registers are known by their place alone, and which of several to leave out nobody can say.
        raise _misfit("the student's registers have no counterparts", teacher, student)
    first_register = int(teacher.class_token)
    return [
        *range(student.class_token),
        *range(first_register, first_register + student.registers),
        *range(teacher.prefix, teacher.tokens),
    ]


def align(attention: Attention, teacher: TokenLayout, student: TokenLayout) -> Attention:
    """The teacher's attention between the tokens that the student has, for the student's tokens.

    Raises:
        StudyError: a token of the student has no counterpart, or the attention has other tokens than `teacher`.
    """
    places = counterparts(teacher, student)
    _check(attention.queries.shape[-2], teacher)
    if places == list(range(teacher.tokens)):
        return attention
    bias, values = attention.bias, attention.values
    if bias is not None:
        for dim in (-2, -1):
            if bias.shape[dim] > 1:  # else it is the same for all tokens
                bias = _select(bias, places, dim)
    return Attention(
        _select(attention.queries, places, -2),
        _select(attention.keys, places, -2),
        bias,
        attention.scale,
        None if values is None else _select(values, places, -2),
    )


def align_maps(maps: Tensor, teacher: TokenLayout, student: TokenLayout) -> Tensor:
    """As `align`, for maps: (.., teacher's tokens, teacher's tokens) to (.., student's tokens, student's tokens).

    Raises:
        StudyError: as `align`, or a row has all of its weight on tokens that the student lacks.
    """
    places = counterparts(teacher, student)
    _check(maps.shape[-1], teacher)
    if places == list(range(teacher.tokens)):
        return maps
    kept = _select(_select(maps, places, -2), places, -1)
    weight = kept.sum(dim=-1, keepdim=True)
    if not (weight > 0).all():
        raise _misfit("a row of a map has no weight on the student's tokens", teacher, student)
    return kept / weight


def _select(tensor: Tensor, places: list[int], dim: int) -> Tensor:
    return tensor.index_select(dim, torch.tensor(places, device=tensor.device))


def _check(tokens: int, teacher: TokenLayout) -> None:
    if tokens != teacher.tokens:
        raise StudyError(
            f"expected attention between {teacher.tokens} tokens ({teacher}), got {tokens}",
            where="the teacher's attention",
            remedy="run the teacher on images of the size that it was built for",
        )


def _misfit(problem: str, teacher: TokenLayout, student: TokenLayout) -> StudyError:
    return StudyError(
        f"{problem}: the teacher has {teacher}, the student {student}",
        where="transfer of attention",
        remedy="give the student the teacher's patch grid and no token that the teacher lacks",
    )
