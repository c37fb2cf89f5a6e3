"""Reading and replacing attention where every timm family computes it: at scaled dot-product attention.

Queries and keys are seen after q/k norm and rotary embedding, as the function receives them. Only
calls made by a block's own attention module count: attention pools call the same function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SERVED = (TimmAttention, AttentionRope, BeitAttention, EvaAttention, RelPosAttention)
"""timm's attention over all tokens of an image, in one call of scaled dot-product attention."""

REFUSED = {
    "ParallelScalingBlock": "its attention is no module of its own",
    "ParallelThingsBlock": "it runs several attentions side by side",
    "DiffAttention": "it subtracts one map from another",
    "MaskUnitAttention": "it pools queries and attends within windows",
    "MultiScaleAttention": "it pools queries, keys and values",
    "WindowAttention": "it attends within windows",
    "XCA": "it attends between channels, not between tokens",
    "TalkingHeadAttn": "it mixes the maps of its heads",
}
"""Why attention that timm models call otherwise cannot be transferred, by the class of module or block."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention, as queries and keys.

    Attributes:
        queries, keys: (batch, heads, tokens, head_dim).
        bias: added to the scaled logits, broadcastable to (batch, heads, tokens, tokens).
        scale: of the logits; 1 / sqrt(head_dim) if None.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None = None
    scale: float | None = None

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Both, where they are all that there is to know of the map.

        Raises:
            TypeError: the model adds a bias to its logits, or scales them in its own way.
        """
        if self.bias is not None or self.scale is not None:
            raise TypeError(
                "an attention bias (relative positions) or a scale of its own cannot be transferred"
            )
        return self.queries, self.keys

    def logits(self) -> Tensor:
        """S = scale q k^T + bias: (batch, heads, tokens, tokens)."""
        scale = self.queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = (self.queries * scale) @ self.keys.transpose(-2, -1)
        return logits if self.bias is None else logits + self.bias

    def map(self) -> Tensor:
        """P = softmax(S) over the keys."""
        return self.logits().softmax(dim=-1)

    def apply(self, values: Tensor) -> Tensor:
        """P v, by PyTorch's fused attention: (batch, heads, tokens, value_dim)."""
        queries, keys = self.queries.to(values.dtype), self.keys.to(values.dtype)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.bias, scale=self.scale)


class ValueAttention(nn.Module):
    """A copy student's attention: values and projection; the map is handed over at every pass.

    It holds no query and key weights. Made from one of timm's modules, whose other weights it takes over.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        weight, bias = _values(attention)
        self.value = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            self.value.weight.copy_(weight)
            if bias is not None:
                self.value.bias.copy_(bias)
        # Not every class has all of these.
        self.norm, self.gate = getattr(attention, "norm", nn.Identity()), getattr(attention, "gate", None)
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.handed_over: Attention | None = None

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


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model's blocks, from the input to the output.

    Raises:
        TypeError: the blocks have no attention that can be read, and why.
    """
    modules = []
    for block in getattr(model, "blocks", []):
        module = getattr(block, "attn", block)
        if not isinstance(module, (ValueAttention, *SERVED)):
            kind = type(module).__name__
            raise TypeError(
                f"{type(model).__name__} has blocks with {type(module).__module__}.{kind}: cannot be served, "
                f"{REFUSED.get(kind, 'it is none of ' + ', '.join(served.__name__ for served in SERVED))}"
            )
        if not isinstance(module, ValueAttention):
            module.fused_attn = True  # the unfused path does not call the function that is intercepted
        modules.append(module)
    if not modules:
        raise TypeError(f"{type(model).__name__} has no transformer blocks")
    return modules


def slim(model: nn.Module, layers: Iterable[int]) -> None:
    """Removes the query and key weights of the layers whose attention will be handed over."""
    modules = attention_modules(model)
    for layer in layers:
        model.blocks[layer].attn = ValueAttention(modules[layer])  # type: ignore[index, union-attr]


@contextlib.contextmanager
def read(model: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, Attention]]:
    """Collects the attention of the model's next forward pass, by layer; outputs stay as they are."""
    found: dict[int, Attention] = {}

    def keep(layer: int) -> Callable[..., Tensor]:
        def intercepted(
            queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, **options: Any
        ) -> Tensor:
            found[layer] = Attention(queries, keys, attn_mask, options.get("scale"))
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=attn_mask, **options)

        return intercepted

    with _intercept(model, {layer: keep(layer) for layer in layers}):
        yield found


@contextlib.contextmanager
def hand_over(model: nn.Module, attention: Mapping[int, Attention]) -> Iterator[None]:
    """In the block's forward passes, the given layers use the given attention instead of their own."""
    modules = attention_modules(model)
    slimmed = {layer: modules[layer] for layer in attention if isinstance(modules[layer], ValueAttention)}

    def replace(given: Attention) -> Callable[..., Tensor]:
        def intercepted(queries: Tensor, keys: Tensor, values: Tensor, **_: Any) -> Tensor:
            return given.apply(values)

        return intercepted

    try:
        for layer, module in slimmed.items():
            module.handed_over = attention[layer]  # type: ignore[assignment]
        with _intercept(model, {k: replace(given) for k, given in attention.items() if k not in slimmed}):
            yield
    finally:
        for module in slimmed.values():
            module.handed_over = None  # type: ignore[assignment]


class _Interceptor(TorchFunctionMode):
    """Sends calls of scaled dot-product attention to `handler`, everything else on its way."""

    def __init__(self, handler: Callable[..., Tensor]) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Within this method the mode is off, so that the handler can call the function itself.
        if func is F.scaled_dot_product_attention:
            return self.handler(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _intercept(model: nn.Module, handlers: Mapping[int, Callable[..., Tensor]]) -> Iterator[None]:
    """Installs a handler for the attention calls of each given layer, for the block's duration."""
    modules = attention_modules(model) if handlers else []
    with contextlib.ExitStack() as stack:
        for layer, handler in handlers.items():
            original = modules[layer].forward

            def intercepted(
                *args: Any, original: Any = original, handler: Any = handler, **kwargs: Any
            ) -> Tensor:
                with _Interceptor(handler):
                    return original(*args, **kwargs)

            stack.callback(_restore_forward, modules[layer], vars(modules[layer]).get("forward"))
            modules[layer].forward = intercepted
        yield


def _restore_forward(module: nn.Module, before: Any) -> None:
    """Takes an interception away; one that was installed around it stays."""
    if before is None:
        del module.forward
    else:
        module.forward = before
