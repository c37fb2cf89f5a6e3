"""Attention Copy: the student's maps are the teacher's, in training and at inference (paper A, section 3.1).

Its variants hand over queries, keys or values alone, and of some heads alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer.models.attention import Attention, hand_over
from attention_transfer.transfer.maps import Maps, fitted
from attention_transfer.transfer.method import Given, Loss, Needs

Part = Literal["map", "query", "key", "value"]
NEEDED: dict[Part, Literal["attention", "queries_and_keys", "values"]] = {
    "map": "attention",
    "query": "queries_and_keys",
    "key": "queries_and_keys",
    "value": "values",
}


class AttentionCopy:
    """out = P_teacher v_student, in the given layers and heads.

    Args:
        student: slimmed in the layers whose whole map is copied, see `models.attention.slim`.
        layers: same layer to same layer, same head to same head.
        heads: of each of these layers, which heads; the others attend by themselves.
        transfer: what of the teacher is handed over; `map` is queries and keys together.
        student_heads: number of the student's heads; teachers with another number are fitted to it.
    """

    teacher_at_inference = True

    def __init__(
        self,
        student: nn.Module,
        *,
        layers: tuple[int, ...],
        heads: tuple[tuple[int, ...], ...],
        transfer: Part,
        student_heads: int,
        label_smoothing: float,
    ) -> None:
        self.student = student
        self.layers, self.heads, self.transfer = layers, heads, transfer
        self.student_heads = student_heads
        self.needs = Needs(NEEDED[transfer], layers)
        self.label_smoothing = label_smoothing

    def train(self) -> None:
        self.student.train()

    def loss(self, images: Tensor, labels: Tensor, given: Given | None) -> Loss:
        logits = self.logits(self.student, images, given)
        task = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return Loss(total=task, task=task)

    def logits(self, student: nn.Module, images: Tensor, given: Given | None) -> Tensor:
        if given is None:
            raise ValueError("Attention Copy needs the teacher's attention at every pass")
        pairs = zip(given.attention, self.heads, strict=True)
        replacements = [self._replacement(teacher, heads) for teacher, heads in pairs]
        with hand_over(student, dict(zip(self.layers, replacements, strict=True))):
            return student(images)

    def _replacement(
        self, teacher: Attention | Maps, heads: tuple[int, ...]
    ) -> Attention | Maps | CopiedHeads | CopiedParts:
        whole = len(heads) == self.student_heads
        if self.transfer == "map":
            teacher = fitted(teacher, self.student_heads)
            return teacher if whole else CopiedHeads(teacher, heads)
        assert isinstance(teacher, Attention)  # config: only maps are averaged
        return CopiedParts(teacher, heads, self.transfer)


@dataclass(frozen=True)
class CopiedHeads:
    """Some heads of a layer use the teacher's map, the others their own."""

    teacher: Attention | Maps
    heads: tuple[int, ...]

    def replace(self, own: Attention) -> Tensor:
        assert own.values is not None
        chosen = mask(self.heads, own.values)
        if _one_call(self.teacher, own):
            assert isinstance(self.teacher, Attention)
            return Attention(
                torch.where(chosen, self.teacher.queries.to(own.queries.dtype), own.queries),
                torch.where(chosen, self.teacher.keys.to(own.keys.dtype), own.keys),
            ).apply(own.values)
        return torch.where(chosen, self.teacher.apply(own.values), own.apply(own.values))


@dataclass(frozen=True)
class CopiedParts:
    """The given heads of a layer use the teacher's queries, keys or values, and else their own parts."""

    teacher: Attention
    heads: tuple[int, ...]
    transfer: Literal["query", "key", "value"]

    def replace(self, own: Attention) -> Tensor:
        assert own.values is not None
        parts = {"query": own.queries, "key": own.keys, "value": own.values}
        given, mine = matching(self.teacher, own, self.transfer)
        parts[self.transfer] = torch.where(mask(self.heads, mine), given.to(mine.dtype), mine)
        return Attention(parts["query"], parts["key"], own.bias, own.scale).apply(parts["value"])


def matching(
    teacher: Attention, own: Attention, transfer: Literal["query", "key", "value"]
) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's queries, keys or values.

    Raises:
        ValueError: their shapes differ.
    """
    given, mine = (
        {"query": attention.queries, "key": attention.keys, "value": attention.values}[transfer]
        for attention in (teacher, own)
    )
    assert given is not None  # `Needs` asks for values
    assert mine is not None
    if given.shape != mine.shape:
        raise ValueError(
            f"the teacher's {transfer} has shape {tuple(given.shape)}, the student's {tuple(mine.shape)}: "
            "width, heads and tokens must be equal"
        )
    return given, mine


def mask(heads: tuple[int, ...], like: Tensor) -> Tensor:
    """bool (1, heads, 1, 1): which heads are chosen."""
    chosen = torch.zeros(like.shape[1], dtype=torch.bool)
    chosen[list(heads)] = True
    return chosen.view(1, -1, 1, 1).to(like.device)


def _one_call(teacher: Attention | Maps, own: Attention) -> bool:
    """Heads of both can go through one call: equal sizes, no bias, the usual scale."""
    if isinstance(teacher, Maps):
        return False
    if any(part is not None for side in (teacher, own) for part in (side.bias, side.scale)):
        return False
    return teacher.queries.shape == own.queries.shape
