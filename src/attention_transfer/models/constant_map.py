"""P v for a map that is no function of any weight, as in Attention Copy: only v gets a gradient.

On a CPU, PyTorch's fused attention computes the gradients of q and k where nobody asks for them: five products
of the size of the map, where two will do, or one if the map was kept.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_transfer.blocks import BLOCK_BYTES, blocks, is_small

Path = Literal["materialised", "streamed", "fused"]


def path(device: str, tokens: int, head_dim: int) -> Path:
    """How a constant map is applied: a rule of shapes and device, which the run records.

    On a CPU a map is kept, which is the fastest there (benchmarks/constant_map.py), where it is no larger than
    its layer's queries, keys, values and result together; else blocks of it are made twice, in memory linear in
    the tokens.
    """
    if device != "cpu":
        return "fused"
    return "materialised" if is_small(tokens, head_dim) else "streamed"


def mixed_by_constant_map(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    how: Path | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """softmax(scale q k^T + bias) v, of which only v has a gradient.

    Args:
        queries, keys: (batch, heads, tokens, head_dim); constants, in the values' format.
        values: (batch, heads, tokens, value_dim).
        bias: broadcastable to (batch, heads, tokens, tokens); a constant.
        scale: of the logits; 1 / sqrt(head_dim) if None.
        how: by `path` if None.
        block_bytes: room for streamed maps, at least one row of them.

    Returns:
        (batch, heads, tokens, value_dim).
    """
    match how or path(queries.device.type, *queries.shape[-2:]):
        case "fused":
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
        case "materialised":
            return _map(_scaled(queries, scale), keys, bias) @ values
        case "streamed":
            mixed: Tensor = _Streamed.apply(values, queries, keys, bias, scale, block_bytes)
            return mixed


def _scaled(queries: Tensor, scale: float | None) -> Tensor:
    return queries * (queries.shape[-1] ** -0.5 if scale is None else scale)


def _map(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """Of scaled queries; its softmax in float32 at least."""
    logits = (queries @ keys.mT).to(torch.promote_types(queries.dtype, torch.float32))
    return (logits if bias is None else logits + bias).softmax(dim=-1).to(queries.dtype)


class _Streamed(torch.autograd.Function):
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
        batch, heads, tokens, _ = queries.shape
        if bias is not None:
            bias = bias.broadcast_to(batch, heads, tokens, keys.shape[2])
        q, k, g = (part.flatten(0, 1) for part in (_scaled(queries, ctx.scale), keys, gradient))
        found = torch.empty_like(g)
        for at, line in blocks(len(q), tokens, k.shape[1], ctx.block // q.itemsize):
            which = torch.arange(at.start, at.stop, device=q.device)
            added = None if bias is None else bias[which // heads, which % heads, line]
            part = _map(q[at, line], k[at], added).mT @ g[at, line]
            if line.start == 0:
                found[at] = part
            else:
                found[at] += part
        return found.view(gradient.shape), None, None, None, None, None
