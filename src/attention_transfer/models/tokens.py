"""Which tokens a Vision Transformer attends between, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from attention_transfer.models.interception import unwrapped


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of every timm Vision Transformer: class token, registers, patches.

    Attributes:
        class_token: whether there is one; it comes first.
        registers: number of tokens between class token and patches (DeiT's distillation token is one).
        grid: rows and columns of patches, in reading order.
    """

    class_token: bool
    registers: int
    grid: tuple[int, int]

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return self.class_token + self.registers

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        prefix = f"{'a' if self.class_token else 'no'} class token, {self.registers} registers"
        return f"{prefix}, {self.grid[0]} x {self.grid[1]} patches"


def token_layout(model: nn.Module) -> TokenLayout:
    """The layout of a timm Vision Transformer, for images of the size that it was built for.

    Raises:
        TypeError: the model has no fixed grid of patches, or drops some of them at random.
    """
    inner: Any = unwrapped(model)
    grid = getattr(getattr(inner, "patch_embed", None), "grid_size", None)
    if grid is None:
        raise TypeError(f"{type(inner).__name__} has no fixed grid of patches")
    if getattr(getattr(inner, "patch_drop", None), "prob", 0.0) > 0:
        raise TypeError(f"{type(inner).__name__} drops patches at random: its tokens change with every pass")
    class_token = inner.cls_token is not None
    return TokenLayout(class_token, inner.num_prefix_tokens - class_token, (int(grid[0]), int(grid[1])))
