"""The loss of Attention Distill: as its formula stands, and the same without keeping any map."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_transfer.blocks import BLOCK_BYTES, blocks


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
    pairs = zip(teacher.softmax(dim=-1), student, strict=True)
    layers = torch.stack([map_cross_entropy(probabilities, logits) for probabilities, logits in pairs])
    return layers.sum() if reduction == "sum" else layers.mean()


def map_cross_entropy(probabilities: Tensor, logits: Tensor) -> Tensor:
    """The same of one layer, for a teacher whose attention is given as a map.

    Args:
        probabilities: the teacher's maps, (batch, heads, queries, keys).
        logits: the student's scaled logits, of this shape.
    """
    if probabilities.shape != logits.shape:
        raise ValueError(
            f"expected student logits like the teacher's maps, {tuple(probabilities.shape)}, "
            f"got {tuple(logits.shape)}"
        )
    return -(probabilities * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def streamed_attention_cross_entropy(
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    teacher_bias: Tensor | None = None,
    teacher_scale: float | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """`attention_cross_entropy` of one layer, from queries and keys, in memory linear in the tokens.

    Maps are made block by block and not kept: a row's gradient is P_student - P_teacher, known as soon as
    the loss is, and what it means for queries and keys has their size. The matrix products are those of
    the formula and its gradient, and none is computed twice.

    Args:
        teacher_queries, teacher_keys: (batch, heads, tokens, teacher's head_dim); constants.
        queries, keys: the student's, (batch, heads, tokens, head_dim).
        teacher_bias, bias: added to the scaled logits, the same for all images: broadcastable to
            (1, heads, tokens, tokens), as is the gradient.
        teacher_scale, scale: of the logits; 1 / sqrt(head_dim) if None.
        temperature: divides the logits of both.
        block_bytes: room for one network's maps, at least one row of them.

    Returns:
        A float32 scalar (float64 for float64): mean over batch, heads and queries.
    """
    teacher_scale, scale = checked_scales(
        teacher_queries, teacher_keys, queries, keys, teacher_scale=teacher_scale, scale=scale
    )
    heads, tokens = queries.shape[1:3]
    scales = (teacher_scale / temperature, scale / temperature)
    biases = [
        None if given is None else (given / temperature).broadcast_to(1, heads, tokens, tokens).squeeze(0)
        for given in (teacher_bias, bias)
    ]
    loss: Tensor = _Streamed.apply(
        teacher_queries, teacher_keys, biases[0], queries, keys, biases[1], scales, block_bytes
    )
    return loss


def checked_scales(
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    teacher_scale: float | None,
    scale: float | None,
) -> tuple[float, float]:
    """The scales of a teacher's and a student's logits: 1 / sqrt(head_dim) where they are None.

    Raises:
        ValueError: the maps of the two would not have one shape.
    """
    for given in (teacher_queries, teacher_keys):
        if given.shape[:-1] != queries.shape[:-1] or keys.shape != queries.shape:
            raise ValueError(
                f"expected student queries and keys for a teacher's {tuple(given.shape)}, "
                f"got {tuple(queries.shape)} and {tuple(keys.shape)}"
            )
    return (
        teacher_queries.shape[-1] ** -0.5 if teacher_scale is None else teacher_scale,
        queries.shape[-1] ** -0.5 if scale is None else scale,
    )


class _Streamed(torch.autograd.Function):
    """Maps of batch and heads are rows of one axis, image by image; biases are (heads, tokens, tokens)."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them by position
        ctx: Any,
        teacher_queries: Tensor,
        teacher_keys: Tensor,
        teacher_bias: Tensor | None,
        queries: Tensor,
        keys: Tensor,
        bias: Tensor | None,
        scales: tuple[float, float],
        block: int,
    ) -> Tensor:
        heads, tokens = queries.shape[1:3]
        accumulated = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            # (batch * heads, tokens, head_dim), in the student's format; the scales go into the queries.
            parts = (teacher_queries * scales[0], teacher_keys, queries * scales[1], keys)
            tq, tk, q, k = (part.to(queries.dtype).flatten(0, 1) for part in parts)
            wanted = ctx.needs_input_grad
            dq = torch.empty_like(q) if wanted[3] else None
            # Added up over blocks of rows, so that bfloat16 would round once a block.
            dk = torch.zeros_like(k, dtype=accumulated) if wanted[4] else None
            db = torch.zeros_like(bias, dtype=accumulated) if bias is not None and wanted[5] else None
            total = torch.zeros((), dtype=accumulated, device=q.device)
            for at, line in blocks(q.shape[0], tokens, k.shape[1], block // accumulated.itemsize):
                if bias is not None or teacher_bias is not None:
                    head = torch.arange(at.start, at.stop, device=q.device) % heads
                target = (tq[at, line] @ tk[at].mT).to(accumulated)
                own = (q[at, line] @ k[at].mT).to(accumulated)
                if teacher_bias is not None:
                    target += teacher_bias[head, line]
                if bias is not None:
                    own += bias[head, line]
                target, own = target.softmax(dim=-1), own.log_softmax(dim=-1)
                total -= torch.vdot(target.flatten(), own.flatten())
                if dq is None and dk is None and db is None:
                    continue
                difference = own.exp_().sub_(target)
                if db is not None:
                    db[:, line].index_add_(0, head, difference)
                difference = difference.to(q.dtype)
                if dq is not None:
                    dq[at, line] = difference @ k[at]
                if dk is not None and dk.dtype == q.dtype:
                    dk[at].baddbmm_(difference.mT, q[at, line])
                elif dk is not None:
                    dk[at] += difference.mT @ q[at, line]
        rows = q.shape[0] * tokens
        ctx.factor, ctx.scale, ctx.shape, ctx.dtype = 1 / rows, scales[1], queries.shape, keys.dtype
        ctx.save_for_backward(dq, dk, db)
        return total / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, db = ctx.saved_tensors
        factor = gradient * ctx.factor
        return (
            None,
            None,
            None,
            None if dq is None else (dq * (factor * ctx.scale)).view(ctx.shape),
            None if dk is None else (dk * factor).to(ctx.dtype).view(ctx.shape),
            None if db is None else db * factor,
            None,
            None,
        )
