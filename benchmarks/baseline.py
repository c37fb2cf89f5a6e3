"""The obvious attention transfer, as a good engineer writes it in an hour: what the benchmarks compare with.

Teacher and student live in one module. The teacher runs in every step, all maps are materialised in
float32, and the student computes its queries and keys also where its map is copied. Nothing of the library
is used here, and nothing here is slowed: this is a yardstick, not a straw man.
"""

from __future__ import annotations

from typing import Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MapAttention(nn.Module):
    """timm's attention with its map written out: stored after each pass, replaced where one is set."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.logits: Tensor | None = None
        self.map: Tensor | None = None
        self.replacement: Tensor | None = None

    def forward(self, tokens: Tensor, **_: object) -> Tensor:
        """tokens: (batch, tokens, width)."""
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        self.logits = (queries * self.scale) @ keys.transpose(-2, -1)
        self.map = self.logits.float().softmax(dim=-1)
        used = self.map if self.replacement is None else self.replacement
        mixed = used.to(values.dtype) @ values
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


class Baseline(nn.Module):
    """Teacher and student side by side.

    Args:
        method: `copy` or `distill`, in all layers.
        weight: of the attention loss, summed over the layers (distill).
    """

    def __init__(
        self, name: str, method: Literal["copy", "distill"], *, weight: float = 3.0, **arguments: object
    ) -> None:
        super().__init__()
        self.teacher = timm.create_model(name, **{**arguments, "num_classes": 0}).eval().requires_grad_(False)
        self.student = timm.create_model(name, **arguments)
        self.method, self.weight = method, weight
        for model in (self.teacher, self.student):
            for block in model.blocks:
                block.attn = MapAttention(block.attn)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Task loss, plus the weighted cross-entropy of the maps for distill."""
        with torch.no_grad():
            self.teacher(images)
        pairs = [
            (teacher.attn, student.attn)
            for teacher, student in zip(self.teacher.blocks, self.student.blocks, strict=True)
        ]
        if self.method == "copy":
            for teacher, student in pairs:
                student.replacement = teacher.map
            return F.cross_entropy(self.student(images), labels)
        task = F.cross_entropy(self.student(images), labels)
        for teacher, student in pairs:
            log_map = student.logits.float().log_softmax(dim=-1)
            task = task - self.weight * (teacher.map * log_map).sum(dim=-1).mean()
        return task
