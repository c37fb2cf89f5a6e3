"""Rows of the attention cache as the bytes that a shard holds, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_transfer.transfer.cache_layout import Layout
from attention_transfer.transfer.quantisation import Stored


def pack(rows: Stored, into: Tensor, layout: Layout) -> None:
    """Writes rows (n, *layout.shape) into bytes (n, units, unit_bytes), uint8 on the CPU."""
    if rows.scales is None:
        into.view(rows.numbers.dtype).view(rows.numbers.shape).copy_(rows.numbers)
    else:
        cut = layout.unit_values
        into[..., :cut].view(torch.int8).copy_(rows.numbers.reshape(*into.shape[:2], cut))
        scales = rows.scales.contiguous().view(torch.uint8)
        into[..., cut:].copy_(scales.reshape(*into.shape[:2], -1))


def unpack(stored: Tensor, layout: Layout) -> Stored:
    """The reverse, for any number of units: numbers (n, units, heads, tokens, ...), not copied."""
    tail = layout.shape[-3:]
    if layout.dtype != "int8":
        return Stored(stored.view(getattr(torch, layout.dtype)).unflatten(-1, tail), None)
    numbers = stored[..., : layout.unit_values].view(torch.int8).unflatten(-1, tail)
    # A copy of its own: a scale that begins at an odd byte cannot be viewed as a number.
    scales = stored[..., layout.unit_values :].clone(memory_format=torch.contiguous_format)
    return Stored(numbers, scales.view(torch.float16).unflatten(-1, (*tail[:2], 1)))
