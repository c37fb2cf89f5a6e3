"""The loss of Attention Distill: as its formula stands, and the same without keeping any map."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK_BYTES = 2**20  # of one network's maps at a time: they stay in a core's cache


def attention_cross_entropy(teacher: Tensor, student: Tensor, *, reduction: Literal["sum", "mean"]) -> Tensor:
    """Cross-entropy between the teacher's and the student's attention maps (paper A, section 3.2).

    -(P_teacher * log P_student) summed over the keys, mean over batch, heads and queries, at temperature
    1; over the layers the sum, as in the official code, or the mean.

    Args:
        teacher, student: scaled logits before softmax, (layers, batch, heads, queries, keys).

    Returns:
        A scalar. Its least value, for equal maps, is the entropy of the teacher's maps.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"expected student logits like the teacher's, {tuple(teacher.shape)}, got {tuple(student.shape)}"
        )
    rows = -(teacher.softmax(dim=-1) * F.log_softmax(student.float(), dim=-1)).sum(dim=-1)
    layers = rows.flatten(start_dim=1).mean(dim=1)
    return layers.sum() if reduction == "sum" else layers.mean()


def streamed_attention_cross_entropy(
    teacher: Tensor, queries: Tensor, keys: Tensor, *, block_bytes: int = BLOCK_BYTES
) -> Tensor:
    """`attention_cross_entropy` of one layer, from queries and keys, in memory linear in the tokens.

    Maps are made block by block and not kept: a row's gradient is P_student - P_teacher, known as soon as
    the loss is, and what it means for queries and keys has their size. The matrix products are those of
    the formula and its gradient, and none is computed twice.

    Args:
        teacher: queries and keys, (batch, 2, heads, tokens, teacher's head_dim); constants.
        queries, keys: the student's, (batch, heads, tokens, head_dim).
        block_bytes: room for one network's maps, at least one row of them.

    Returns:
        A float32 scalar (float64 for float64): mean over batch, heads and queries.
    """
    batch, heads, tokens, _ = queries.shape
    if teacher.shape[:-1] != (batch, 2, heads, tokens) or keys.shape != queries.shape:
        raise ValueError(
            f"expected student queries and keys for a teacher's {tuple(teacher.shape)}, "
            f"got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    loss: Tensor = _Streamed.apply(teacher, queries, keys, block_bytes)
    return loss


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: Tensor, queries: Tensor, keys: Tensor, block: int) -> Tensor:
        tokens, width = queries.shape[-2:]
        accumulated = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            # (batch * heads, tokens, head_dim), in the student's format; the scales go into the queries.
            given = (teacher[:, 0] * teacher.shape[-1] ** -0.5, teacher[:, 1], queries, keys)
            tq, tk, q, k = (part.to(queries.dtype).flatten(0, 1) for part in given)
            scaled = q * width**-0.5
            rows = q.shape[0] * tokens
            dq = torch.empty_like(q) if ctx.needs_input_grad[1] else None
            dk = torch.zeros_like(k) if ctx.needs_input_grad[2] else None
            total = torch.zeros((), dtype=accumulated, device=q.device)
            maps, lines = _blocks(q.shape[0], tokens, k.shape[1], block // accumulated.itemsize)
            for first in range(0, q.shape[0], maps):
                at = slice(first, first + maps)
                for top in range(0, tokens, lines):
                    line = slice(top, top + lines)
                    target = (tq[at, line] @ tk[at].mT).to(accumulated).softmax(dim=-1)
                    own = (scaled[at, line] @ k[at].mT).to(accumulated).log_softmax(dim=-1)
                    total -= torch.vdot(target.flatten(), own.flatten())
                    if dq is None and dk is None:
                        continue
                    difference = own.exp_().sub_(target).to(q.dtype)
                    if dq is not None:
                        dq[at, line] = difference @ k[at]
                    if dk is not None:
                        dk[at].baddbmm_(difference.mT, scaled[at, line])
        ctx.factor, ctx.shapes = 1 / rows, (queries.shape, keys.shape)
        ctx.scale = width**-0.5
        ctx.save_for_backward(*(part for part in (dq, dk) if part is not None))
        return total / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        saved = list(ctx.saved_tensors)
        factor = gradient * ctx.factor
        found: list[Tensor | None] = [None, None]
        for place, scale in ((0, ctx.scale), (1, 1.0)):
            if ctx.needs_input_grad[1 + place]:
                found[place] = (saved.pop(0) * (factor * scale)).view(ctx.shapes[place])
        return None, found[0], found[1], None


def _blocks(maps: int, queries: int, keys: int, room: int) -> tuple[int, int]:
    """How many maps, and how many of their rows, to make at a time: whole maps if one fits."""
    lines = max(1, min(queries, room // keys))
    return (max(1, min(maps, room // (queries * keys))), lines) if lines == queries else (1, lines)
