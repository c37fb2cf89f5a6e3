"""Which timm attention can be read and replaced, and why other attention cannot."""

from __future__ import annotations

from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import nn

from attention_transfer.models.interception import Intercepted, unwrapped
from attention_transfer.models.value_attention import ValueAttention

SERVED = (TimmAttention, AttentionRope, BeitAttention, EvaAttention, RelPosAttention)
"""timm's attention over all tokens of an image, in one call of scaled dot-product attention."""

REFUSED = {
    "ParallelScalingBlock": "its attention is no module of its own",
    "ParallelThingsBlock": "it runs several attentions side by side",
    "DiffAttention": "it subtracts one map from another",
    "DiffParallelScalingBlock": "it subtracts one map from another",
    "MaskUnitAttention": "it pools queries and attends within windows",
    "MultiScaleAttention": "it pools queries, keys and values",
    "MultiScaleAttentionPoolFirst": "it pools queries, keys and values",
    "WindowAttention": "it attends within windows",
    "XCA": "it attends between channels, not between tokens",
    "TalkingHeadAttn": "it mixes the maps of its heads",
}
"""Why attention that timm models call otherwise cannot be transferred, by the class of module or block."""


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model's blocks, from the input to the output.

    Raises:
        TypeError: the blocks have no attention that can be read, and why.
    """
    model = unwrapped(model)
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(blocks) == 0:
        raise TypeError(f"{type(model).__name__} has no transformer blocks{_reason(model, '')}")
    modules = []
    for block in map(unwrapped, blocks):
        module = getattr(block, "attn", block)
        if not isinstance(module, (Intercepted, ValueAttention, *SERVED)):
            none_of = f", it is none of {', '.join(served.__name__ for served in SERVED)}"
            raise TypeError(
                f"{type(model).__name__} has blocks with {type(module).__module__}.{type(module).__name__}: "
                f"cannot be served{_reason(module, none_of)}"
            )
        modules.append(module)
    return modules


def _reason(module: nn.Module, otherwise: str) -> str:
    """What is known of the attention in a module that cannot be served."""
    for part in module.modules():
        kind = type(part).__name__
        if kind in REFUSED:
            return f", {REFUSED[kind]} ({kind})"
    return otherwise
