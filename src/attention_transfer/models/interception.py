"""Intercepting the calls of scaled dot-product attention that chosen blocks of a model make.

Meanwhile the blocks concerned are shallow copies, with the same weights, that carry the request. Activation
checkpointing keeps these copies, so that the recomputation in the backward pass, when the request has long
been taken back, does what the forward pass did.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Handler = Callable[..., Tensor]
"""Called with the arguments of scaled dot-product attention, in its place."""


class Intercepted(nn.Module):
    """Stands in a block for its attention module, whose calls go to a handler.

    Attributes:
        replaces: whether the handler's answer is something else than the call's own.
    """

    def __init__(self, attention: nn.Module, handler: Handler, *, replaces: bool = False) -> None:
        super().__init__()
        if not getattr(attention, "fused_attn", True):
            attention = copy.copy(attention)
            attention.fused_attn = True  # type: ignore[assignment]  # the other path makes no such call
        self.attention = attention
        self.handler = handler
        self.replaces = replaces
        self.interceptor = _Interceptor(handler)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.interceptor:
            return self.attention(*args, **kwargs)


class _Interceptor(TorchFunctionMode):
    """Sends calls of scaled dot-product attention to a handler, everything else on its way."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Within this method the mode is off, so that the handler can call the function itself.
        if func is F.scaled_dot_product_attention:
            return self.handler(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def unwrapped(model: nn.Module) -> nn.Module:
    """What is inside of the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        children = dict(model.named_children())
        inner = children.get("_orig_mod", children.get("module"))
        if inner is None:
            return model
        model = inner


def _twin(block: nn.Module) -> nn.Module:
    """A shallow copy, without what torch.compile made of the block, but with the hooks by which its weights are spread.

    `copy.copy` would call the class, and that of a sharded block makes an unsharded one.
    """
    twin: nn.Module = object.__new__(type(block))
    twin.__setstate__(block.__getstate__())
    return twin


@contextlib.contextmanager
def substituted(model: nn.Module, attention: Mapping[int, nn.Module]) -> Iterator[None]:
    """Other attention modules in the given blocks of a model, for the duration of the `with` block."""
    blocks: Any = unwrapped(model).blocks
    before = {layer: blocks[layer] for layer in attention}
    try:
        for layer, module in attention.items():
            block = _twin(unwrapped(before[layer]))
            block._modules = {**block._modules, "attn": module}
            blocks[layer] = block
        yield
    finally:
        for layer, block in before.items():
            block.training = blocks[layer].training
            blocks[layer] = block
