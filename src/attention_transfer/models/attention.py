"""Reading and replacing attention where every timm family computes it: at scaled dot-product attention.

Queries and keys are seen after q/k norm and rotary embedding, as the function receives them. Only
calls made by a block's own attention module count: attention pools call the same function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.layers import use_reentrant_ckpt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function

from attention_transfer.models.attention_families import attention_modules
from attention_transfer.models.constant_map import mixed_by_constant_map
from attention_transfer.models.interception import Handler, Intercepted, substituted, unwrapped
from attention_transfer.models.value_attention import ValueAttention, WholeMap


class Replacement(Protocol):
    """What a layer can be handed over: anything that makes its mixed values."""

    def replace(self, own: Attention) -> Tensor:
        """The layer's mixed values, (batch, heads, tokens, value_dim), from its own q, k, v, bias and scale."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention, as queries and keys.

    Attributes:
        queries, keys: (batch, heads, tokens, head_dim).
        bias: added to the scaled logits, broadcastable to (batch, heads, tokens, tokens).
        scale: of the logits; 1 / sqrt(head_dim) if None.
        values: what the map was applied to, (batch, heads, tokens, value_dim), where that is known.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None = None
    scale: float | None = None
    values: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.queries.shape[-3]

    def logits(self) -> Tensor:
        """S = scale q k^T + bias: (batch, heads, tokens, tokens)."""
        scale = self.queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = (self.queries * scale) @ self.keys.transpose(-2, -1)
        return logits if self.bias is None else logits + self.bias

    def map(self) -> Tensor:
        """P = softmax(S) over the keys."""
        return self.logits().softmax(dim=-1)

    def apply(self, values: Tensor) -> Tensor:
        """P v, by PyTorch's fused attention, in the values' precision: (batch, heads, tokens, value_dim).

        Raises:
            ValueError: the values have other heads or tokens than the keys.
        """
        if values.shape[-3:-1] != self.keys.shape[-3:-1]:  # PyTorch would use one head for all
            given, wanted = (f"{t.shape[-3]} heads and {t.shape[-2]} tokens" for t in (self.keys, values))
            raise ValueError(f"expected attention for values of {wanted}, got {given}")
        queries, keys = self.queries.to(values.dtype), self.keys.to(values.dtype)
        bias = None if self.bias is None else self.bias.to(values.dtype)
        # By an interceptor around this layer, which sees the fused call alone.
        is_read = has_torch_function((values,))
        if _is_constant(queries, keys, bias) and values.requires_grad and not is_read:
            return mixed_by_constant_map(queries, keys, values, bias, self.scale)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=self.scale)

    def replace(self, own: Attention) -> Tensor:
        """This map with the layer's own values; its own queries and keys do not count.

        Raises:
            ValueError: `own` holds no values.
        """
        if own.values is None:
            raise ValueError("this attention was taken without its values, so that nothing can be mixed")
        return self.apply(own.values)


def _is_constant(*parts: Tensor | None) -> bool:
    return not any(part is not None and part.requires_grad for part in parts)


def slim(model: nn.Module, layers: Iterable[int]) -> None:
    """Removes the query and key weights of the layers whose attention will be handed over."""
    modules = attention_modules(model)
    for layer in layers:
        unwrapped(model).blocks[layer].attn = ValueAttention(modules[layer])  # type: ignore[index, union-attr]


class _AllRead(Exception):
    """Leaves a forward pass of which nothing more is wanted."""


@contextlib.contextmanager
def read(
    model: nn.Module, layers: Iterable[int], *, then_stop: bool = False
) -> Iterator[dict[int, Attention]]:
    """Collects the attention of the model's first forward pass in the `with` block; outputs stay as they are.

    Args:
        then_stop: leave the `with` block as soon as the last of the layers has its attention, before it is
            applied.

    Raises:
        TypeError: the model cannot be read, or would give attention without its gradient.
    """
    checkpointing = getattr(unwrapped(model), "grad_checkpointing", False)
    if checkpointing and use_reentrant_ckpt() and torch.is_grad_enabled():
        raise TypeError(
            "re-entrant checkpointing hides gradients of attention: timm's set_reentrant_ckpt(False)"
        )
    modules, found = attention_modules(model), dict[int, Attention]()
    layers = tuple(layers)
    last = max(layers, default=None) if then_stop else None

    def keep(layer: int) -> Handler:
        def handler(*args: Any, **kwargs: Any) -> Tensor:
            found.setdefault(layer, _own(*args, **kwargs))  # not that of a checkpoint's recomputation
            if layer == last:
                raise _AllRead
            return F.scaled_dot_product_attention(*args, **kwargs)

        return handler

    with (
        contextlib.suppress(_AllRead),
        substituted(model, {layer: Intercepted(modules[layer], keep(layer)) for layer in layers}),
    ):
        yield found


@contextlib.contextmanager
def hand_over(model: nn.Module, given: Mapping[int, Replacement]) -> Iterator[None]:
    """In the `with` block, the given layers use what they are given instead of their own attention.

    What was handed over last counts; reading, within or around, sees what is used.

    Raises:
        TypeError: a layer without queries and keys (see `slim`) is given what asks for them.
        ValueError: in the forward pass, if the layer drops attention weights at random.
    """
    modules = attention_modules(model)
    with substituted(model, {layer: _holding(modules[layer], what) for layer, what in given.items()}):
        yield


def _holding(module: nn.Module, given: Replacement) -> nn.Module:
    """The attention module, with the same weights, that uses what it is handed over."""
    if isinstance(module, Intercepted):  # in a `with` block around this one
        inside = _holding(module.attention, given)
        return inside if module.replaces else Intercepted(inside, module.handler)
    if isinstance(module, ValueAttention):
        if not isinstance(given, WholeMap):
            raise TypeError(f"a layer without queries and keys needs a whole map, not {type(given).__name__}")
        return module.holding(given)

    def handler(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dropout_p"):
            raise ValueError("attention dropout is not applied to maps that are handed over: set it to 0")
        return given.replace(_own(*args, **kwargs))

    return Intercepted(module, handler, replaces=True)


def _own(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Attention:
    """What the function is called for; a mask is a bias of minus infinity."""
    if is_causal:
        shape = (queries.shape[-2], keys.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=queries.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=queries.dtype).masked_fill(~attn_mask, float("-inf"))
    return Attention(queries, keys, attn_mask, scale, values)
