"""Attention maps that no queries and keys can say: means of maps, and their fit to another number of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from attention_transfer.models.attention import Attention


@dataclass(frozen=True)
class Maps:
    """One layer's attention as its map.

    Attributes:
        probabilities: (batch, heads, queries, keys), each row with sum 1.
    """

    probabilities: Tensor

    @property
    def heads(self) -> int:
        return self.probabilities.shape[1]

    def map(self) -> Tensor:
        """(batch, heads, queries, keys)."""
        return self.probabilities

    def apply(self, values: Tensor) -> Tensor:
        """P v: (batch, heads, queries, value_dim)."""
        return self.probabilities.to(values.dtype) @ values

    def replace(self, own: Attention) -> Tensor:
        """The block's values, mixed by this map."""
        assert own.values is not None
        return self.apply(own.values)


def normalised(stored: Tensor) -> Maps:
    """Maps whose rows sum to 1 again after they were rounded: float32."""
    probabilities = stored.float()
    return Maps(probabilities / probabilities.sum(dim=-1, keepdim=True))


def averaged(
    attention: tuple[Attention | Maps, ...], over: Literal["queries", "heads", "layers"]
) -> tuple[Maps, ...]:
    """The maps of several layers with each replaced by a mean (the ablation of paper A).

    Over queries every query of an image, head and layer gets the same row; over heads (layers) every head
    (layer) gets the same map. The mean over examples is no function of one batch: see `AveragedOverExamples`.
    """
    maps = [layer.map() for layer in attention]
    match over:
        case "queries":
            means = [layer.mean(dim=-2, keepdim=True).expand_as(layer) for layer in maps]
        case "heads":
            means = [layer.mean(dim=1, keepdim=True).expand_as(layer) for layer in maps]
        case "layers":
            means = [sum(maps[1:], maps[0]) / len(maps)] * len(maps)
    return tuple(map(Maps, means))


def fitted(attention: Attention | Maps, heads: int) -> Attention | Maps:
    """A teacher's attention for a student with another number of heads.

    With fewer heads, each takes the mean map of a group of the teacher's heads that follow each other; with
    more, each of the teacher's heads serves a group of them.

    Raises:
        ValueError: neither number divides the other.
    """
    count = attention.heads
    if count == heads:
        return attention
    if count % heads == 0:
        return Maps(attention.map().unflatten(1, (heads, count // heads)).mean(dim=2))
    if heads % count:
        raise ValueError(f"maps of {count} heads do not fit {heads} heads: one number must divide the other")
    if isinstance(attention, Maps):
        return Maps(attention.probabilities.repeat_interleave(heads // count, dim=1))
    repeats, bias = heads // count, attention.bias
    if bias is not None and bias.shape[1] > 1:  # else it is the same for all heads
        bias = bias.repeat_interleave(repeats, dim=1)
    return Attention(
        attention.queries.repeat_interleave(repeats, dim=1),
        attention.keys.repeat_interleave(repeats, dim=1),
        bias,
        attention.scale,
    )
