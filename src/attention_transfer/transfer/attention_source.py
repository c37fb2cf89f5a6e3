"""Where a step gets the teacher's attention: from the cache, or from the frozen teacher itself."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer.models.attention import read
from attention_transfer.transfer.cache import CacheReader

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class AttentionSource(Protocol):
    """Gives the teacher's queries and keys for a batch of views."""

    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Tensor:
        """Queries and keys, float32 (batch, 2, layers, heads, tokens, head_dim).

        Args:
            images: the rendered views, (batch, channels, size, size).
            examples: the images' numbers in their split.
            view: number of the view; `views.CLEAN` for the images themselves.
        """


class CachedAttention:
    """Reads from the cache; a view that it does not hold is an error."""

    def __init__(self, reader: CacheReader, layers: tuple[int, ...]) -> None:
        self.reader, self.layers = reader, layers

    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Tensor:
        return self.reader.read(examples, view, self.layers).to(images.device, torch.float32)


class OnlineAttention:
    """Runs the teacher, frozen and in eval mode, on exactly the images that the student sees.

    Args:
        dtype: queries and keys are rounded through it, so that this equals reading the cache.
    """

    def __init__(
        self, teacher: nn.Module, layers: tuple[int, ...], dtype: Literal["float16", "float32"]
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.layers, self.dtype = layers, DTYPES[dtype]

    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Tensor:
        return teacher_attention(self.teacher, images, self.layers).to(self.dtype).float()


@torch.no_grad()
def teacher_attention(teacher: nn.Module, images: Tensor, layers: tuple[int, ...]) -> Tensor:
    """The teacher's queries and keys: (batch, 2, layers, heads, tokens, head_dim).

    Raises:
        TypeError: they are not all of its maps.
    """
    with read(teacher, layers) as found:
        teacher.forward_features(images)  # type: ignore[operator]
    return torch.stack([torch.stack(found[layer].queries_and_keys(), dim=1) for layer in layers], dim=2)
