"""P v for a map that is no function of any weight, as in Attention Copy: only v gets a gradient.

PyTorch's fused attention computes the gradients of q and k too, on a CPU also where nobody asks for them:
five products of the size of the map where two will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_transfer.blocks import BLOCK_BYTES, blocks


def mixed_by_constant_map(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float | None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """softmax(scale q k^T + bias) v, in memory linear in the tokens; the gradient is that of v alone.

    Args:
        queries, keys: (batch, heads, tokens, head_dim); constants, in the values' format.
        values: (batch, heads, tokens, value_dim).
        bias: broadcastable to (batch, heads, tokens, tokens); a constant.
        scale: of the logits; 1 / sqrt(head_dim) if None.
        block_bytes: room for maps in the backward pass, at least one row of them.

    Returns:
        (batch, heads, tokens, value_dim).
    """
    mixed: Tensor = _ConstantMap.apply(values, queries, keys, bias, scale, block_bytes)
    return mixed


class _ConstantMap(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them by position
        ctx: Any,
        values: Tensor,
        queries: Tensor,
        keys: Tensor,
        bias: Tensor | None,
        scale: float | None,
        block: int,
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, bias)
        ctx.scale, ctx.block = scale, block
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, bias = ctx.saved_tensors
        batch, heads, tokens, width = queries.shape
        if bias is not None:
            bias = bias.broadcast_to(batch, heads, tokens, keys.shape[2])
        scale = width**-0.5 if ctx.scale is None else ctx.scale
        q, k, g = (part.flatten(0, 1) for part in (queries * scale, keys, gradient))
        found = torch.empty_like(g)
        for at, line in blocks(len(q), tokens, k.shape[1], ctx.block // q.itemsize):
            logits = (q[at, line] @ k[at].mT).to(torch.promote_types(q.dtype, torch.float32))
            if bias is not None:
                which = torch.arange(at.start, at.stop, device=q.device)
                logits += bias[which // heads, which % heads, line]
            part = logits.softmax(dim=-1).to(g.dtype).mT @ g[at, line]
            if line.start == 0:
                found[at] = part
            else:
                found[at] += part
        return found.view(gradient.shape), None, None, None, None, None
