"""Number formats of stored attention: float32, float16, and 8-bit integers with a scale per vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention_transfer.transfer.cache_layout import DType

STEPS = 127  # from zero to the largest value of a vector, on either side


@dataclass(frozen=True)
class Stored:
    """Numbers as they are stored, on any device.

    Attributes:
        numbers: float16, float32 or int8, of the shape that was given.
        scales: float16, one for each vector along the last axis, which has length 1 here; None for floats.
    """

    numbers: Tensor
    scales: Tensor | None

    def floats(self) -> Tensor:
        """The numbers that are meant: float16 or float32 as stored; of int8 float32, where they are exact.

        An integer of 7 bits and sign times a scale of 11 bits fits the 24 bits of float32; in float16
        it would be rounded a second time, and could overflow.
        """
        if self.scales is None:
            return self.numbers
        return self.numbers.to(torch.float32, memory_format=torch.contiguous_format).mul_(self.scales)

    def finite(self) -> Tensor:
        """Of each entry of the first axis: whether all of its values fit the format."""
        decisive = self.numbers if self.scales is None else self.scales
        if all(extreme.isfinite() for extreme in decisive.aminmax()):  # much faster; NaN is its own extreme
            return decisive.new_ones(len(decisive), dtype=torch.bool)
        return decisive.isfinite().flatten(1).all(dim=1)


def stored(values: Tensor, dtype: DType) -> Stored:
    """Rounds to a format, to nearest. Values that do not fit it make their vector infinite or NaN.

    int8 is symmetric: a vector along the last axis is a scale times integers from -127 to 127, so that
    no value is off by more than half the scale (or 2**-143: float32 cannot divide smaller vectors by 127).
    The scale is 1/127 of the vector's largest value, rounded up, to float16: half of float32's bytes, and
    it grows by at most 2**-10 of itself plus 2**-24.

    Args:
        values: floating point.
    """
    if dtype != "int8":
        return Stored(values.to(getattr(torch, dtype)), None)
    values = values.float()
    wanted = values.abs().amax(dim=-1, keepdim=True) / STEPS
    scales = wanted.half()
    # The next larger float16 is the next larger integer of the same bits, up to infinity.
    scales = (scales.view(torch.int16) + (scales.float() < wanted)).view(torch.float16)
    steps = scales.float()
    numbers = (values / steps.where(steps != 0, 1.0)).round().to(torch.int8)
    return Stored(numbers, scales)


def rounded(values: Tensor, dtype: DType) -> Tensor:
    """`values` as they come back from a cache of this format, to the bit, on any device.

    A value that does not fit, which writing refuses, makes its vector infinite or NaN here, never a
    finite number. The result is float16 for float16, and float32 for float32 and int8.
    """
    return stored(values, dtype).floats()
