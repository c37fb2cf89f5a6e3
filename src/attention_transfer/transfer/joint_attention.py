"""A student's attention and its distance from the teacher's, from one map that serves both.

Attention and loss each need the student's map, and again for their gradients: four products of its size more than
here, where it is kept.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention_transfer.blocks import BLOCK_BYTES, blocks, is_small
from attention_transfer.transfer.losses import checked_scales

Path = Literal["joint", "streamed"]


def path(device: str, tokens: int, head_dim: int) -> Path:
    """How maps are distilled: a rule of shapes and device, which the run records.

    On a CPU jointly where a map is no larger than its layer's queries, keys, values and result together; else by
    PyTorch's fused attention and `losses.streamed_attention_cross_entropy`, in memory linear in the tokens.
    """
    return "joint" if device == "cpu" and is_small(tokens, head_dim) else "streamed"


def attention_and_cross_entropy(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    *,
    scale: float | None = None,
    teacher_scale: float | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, and the map's cross-entropy with the teacher's (paper A, section 3.2).

    Keeps two maps for the backward pass: the student's, and its difference from the teacher's.

    Args:
        queries, keys, values: the student's, (batch, heads, tokens, head_dim or value_dim).
        teacher_queries, teacher_keys: (batch, heads, tokens, teacher's head_dim); constants.
        scale, teacher_scale: of the logits; 1 / sqrt(head_dim) if None.
        block_bytes: maps are worked on in blocks of this size, at least one row.

    Returns:
        The mixed values, (batch, heads, tokens, value_dim), and a float32 scalar (float64 for float64): mean
        over batch, heads and queries.
    """
    teacher_scale, scale = checked_scales(
        teacher_queries, teacher_keys, queries, keys, teacher_scale=teacher_scale, scale=scale
    )
    scales = (scale, teacher_scale)
    mixed, loss = _Joint.apply(queries, keys, values, teacher_queries, teacher_keys, scales, block_bytes)
    return mixed, loss


class _Joint(torch.autograd.Function):
    """Maps of batch and heads are rows of one axis, image by image."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them by position
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        teacher_queries: Tensor,
        teacher_keys: Tensor,
        scales: tuple[float, float],
        block: int,
    ) -> tuple[Tensor, Tensor]:
        tokens = queries.shape[2]
        accumulated = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            # (batch * heads, tokens, head_dim), in the student's format; the scales go into the queries.
            parts = (queries * scales[0], keys, values, teacher_queries * scales[1], teacher_keys)
            q, k, v, tq, tk = (part.to(queries.dtype).flatten(0, 1) for part in parts)
            maps = torch.empty(len(q), tokens, tokens, dtype=accumulated, device=q.device)
            differences, mixed = torch.empty_like(maps), torch.empty_like(v)
            total = torch.zeros((), dtype=accumulated, device=q.device)
            for at, line in blocks(len(q), tokens, tokens, block // accumulated.itemsize):
                own = (q[at, line] @ k[at].mT).to(accumulated).log_softmax(dim=-1)
                target = (tq[at, line] @ tk[at].mT).to(accumulated).softmax(dim=-1)
                total -= torch.vdot(target.flatten(), own.flatten())
                maps[at, line] = own.exp_()
                torch.sub(own, target, out=differences[at, line])
                mixed[at, line] = own.to(v.dtype) @ v[at]
        ctx.save_for_backward(q, k, v, maps, differences, mixed)
        ctx.rows, ctx.scale, ctx.block, ctx.shape = len(q) * tokens, scales[0], block, queries.shape[:2]
        return mixed.unflatten(0, queries.shape[:2]), total / ctx.rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mixed: Tensor, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, maps, differences, mixed = ctx.saved_tensors
        tokens, factor = maps.shape[1], (of_loss / ctx.rows).to(maps.dtype)
        with torch.autocast(q.device.type, enabled=False):
            d = of_mixed.to(v.dtype).flatten(0, 1)
            # Of the softmax's gradient, P (dP - rowsum(P dP)): the sums are those of the result and its gradient.
            sums = (d * mixed).sum(dim=-1, keepdim=True, dtype=maps.dtype)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for at, line in blocks(len(q), tokens, tokens, ctx.block // maps.itemsize):
                gradient = (d[at, line] @ v[at].mT).to(maps.dtype)
                gradient.sub_(sums[at, line]).mul_(maps[at, line]).addcmul_(differences[at, line], factor)
                gradient = gradient.to(q.dtype)
                dq[at, line] = gradient @ k[at]
                dk[at].baddbmm_(gradient.mT, q[at, line])
                dv[at].baddbmm_(maps[at, line].to(v.dtype).mT, d[at, line])
        dq, dk, dv = (part.unflatten(0, ctx.shape) for part in (dq.mul_(ctx.scale), dk, dv))
        return dq, dk, dv, None, None, None, None
