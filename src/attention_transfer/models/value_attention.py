"""Attention without queries and keys, for the layers of a copy student."""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class WholeMap(Protocol):
    """What a layer without queries and keys must be handed: attention that asks nothing of the layer."""

    def apply(self, values: Tensor) -> Tensor:
        """P v: (batch, heads, tokens, value_dim)."""


class ValueAttention(nn.Module):
    """A copy student's attention: values and projection; the map is handed over at every pass.

    It holds no query and key weights. Made from one of timm's modules, whose other weights it takes over.

    Raises:
        ValueError: the module has fewer heads of values than of maps, or drops attention weights at random.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        if attention.attn_drop.p > 0:
            raise ValueError("attention dropout is not applied to maps that are handed over: set it to 0")
        self.num_heads = attention.num_heads
        weight, bias = _values(attention)
        self.value = nn.Linear(
            weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            self.value.weight.copy_(weight)
            if bias is not None:
                self.value.bias.copy_(bias)
        # Not every class has all of these.
        self.norm, self.gate = getattr(attention, "norm", nn.Identity()), getattr(attention, "gate", None)
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.handed_over: WholeMap | None = None

    def holding(self, attention: WholeMap) -> ValueAttention:
        """This module with a map, as another object that shares every weight."""
        holder = copy.copy(self)
        holder.handed_over = attention
        return holder

    def forward(self, tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        """tokens: (batch, tokens, width). Blocks pass rotary embeddings, biases and masks: parts of the map."""
        if self.handed_over is None:
            raise RuntimeError("this layer copies its attention: call the model inside hand_over(...)")
        batch, count, _width = tokens.shape
        values = self.value(tokens).view(batch, count, self.num_heads, -1).transpose(1, 2)
        mixed = self.norm(self.handed_over.apply(values).transpose(1, 2).reshape(batch, count, -1))
        if self.gate is not None:
            mixed = mixed * self.gate(tokens).sigmoid()
        return self.proj_drop(self.proj(mixed))


def _values(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the value projection, which timm's modules keep in three ways."""
    if attention.qkv is None:
        if attention.v_proj.out_features != attention.q_proj.out_features:
            raise ValueError("grouped-query attention: its values have fewer heads than its maps")
        return attention.v_proj.weight, attention.v_proj.bias
    bias = attention.qkv.bias
    own_bias = getattr(attention, "v_bias", None)  # in BEiT and EVA, whose keys have none
    return attention.qkv.weight.chunk(3)[2], bias.chunk(3)[2] if bias is not None else own_bias
