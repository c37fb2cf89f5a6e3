"""What a row of the attention cache holds, and how its bytes lie."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Content = Literal["queries_and_keys", "maps"]
DType = Literal["float16", "float32", "int8"]

_NUMPY = {"float16": "<f2", "float32": "<f4", "int8": "u1"}  # of the stored rows
_SCALE_BYTES = 2  # float16


@dataclass(frozen=True)
class Layout:
    """One row: the attention of one (example, view), for all layers of a teacher.

    Its bytes are units, one after the other: the queries of each layer and then the keys of each
    layer, or the map of each layer. A unit is one array (heads, tokens, head_dim or tokens); in int8
    the scales (heads, tokens) follow in the same unit, as float16.

    Maps are softmax outputs rounded to the dtype, and come back as stored. In float16 a row of a map
    sums to 1 within 2**-11 + tokens * 2**-25. It is not normalised anew: rounded again, it would be
    no closer to 1, and each weight farther from the teacher's. What needs a sum of one divides by
    it in float32.

    Attributes:
        head_dim: None for maps.
        dtype: of the stored numbers; maps are floats.
    """

    layers: int
    heads: int
    tokens: int
    head_dim: int | None
    dtype: DType
    content: Content = "queries_and_keys"

    def __post_init__(self) -> None:
        maps = self.content == "maps"
        if self.dtype not in _NUMPY or self.content not in ("queries_and_keys", "maps"):
            raise ValueError(f"no such dtype or content: {self}")
        if maps and (self.head_dim is not None or self.dtype == "int8"):
            raise ValueError(f"maps are stored as floats, and have no head_dim: got {self}")
        if min(self.layers, self.heads, self.tokens, 1 if maps else self.head_dim or 0) < 1:
            raise ValueError(f"sizes are positive: got {self}")

    def entries(self) -> dict[str, Any]:
        """As in the manifest; content is written where it is not the usual one."""
        entries = asdict(self)
        return {key: value for key, value in entries.items() if (key, value) != ("content", Layout.content)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(2, layers, heads, tokens, head_dim), queries first; of maps (layers, heads, tokens, tokens)."""
        if self.head_dim is None:
            return (self.layers, self.heads, self.tokens, self.tokens)
        return (2, self.layers, self.heads, self.tokens, self.head_dim)

    def of_layers(self, count: int) -> tuple[int, ...]:
        """`shape` with another number of layers."""
        return (*self.shape[:-4], count, *self.shape[-3:])

    @property
    def units(self) -> int:
        """Number of units of a row."""
        return math.prod(self.shape[:-3])

    @property
    def unit_values(self) -> int:
        """Numbers of a unit, without scales."""
        return math.prod(self.shape[-3:])

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit, with its scales."""
        scales = self.heads * self.tokens * _SCALE_BYTES if self.dtype == "int8" else 0
        return self.unit_values * self.stored_dtype.itemsize + scales

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, without its checksum."""
        return self.units * self.unit_bytes

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Of the rows in a shard, little-endian: floats as such; integers with their scales as plain bytes."""
        return np.dtype(_NUMPY[self.dtype])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one row in a shard: `shape`, or for int8 (2, layers, bytes of a unit)."""
        return (2, self.layers, self.unit_bytes) if self.dtype == "int8" else self.shape

    def rows_per_shard(self, shard_bytes: int) -> int:
        """Rows of every shard but the last; a shard holds at least one."""
        return max(1, shard_bytes // self.row_bytes)
