"""Training steps to be timed: the plain one, the baseline's, and this library's from cache and online."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from baseline import Baseline, MapAttention
from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer.models.attention import slim
from attention_transfer.transfer.attention_copy import AttentionCopy
from attention_transfer.transfer.attention_distill import AttentionDistill
from attention_transfer.transfer.cache import CacheReader, CacheWriter, Layout
from attention_transfer.transfer.method import Method, Needs
from attention_transfer.transfer.teacher_source import (
    CachedTeacher,
    OnlineTeacher,
    TeacherSource,
    teacher_attention,
)

MODEL = "vit_small_patch16_224"
WEIGHT = 3.0  # of the attention loss, summed over the layers

Kind = Literal["copy", "distill"]
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What all steps of a comparison share.

    Attributes:
        arguments: of timm's ViT-S/16, such as `img_size` and `depth`.
        batch: number of images.
        views: number of cached views; the step reads a random batch of them.
    """

    device: torch.device
    precision: torch.dtype
    batch: int
    arguments: dict[str, Any]
    views: int

    @property
    def size(self) -> int:
        size: int = self.arguments.get("img_size", 224)
        return size


def default_setting(device: torch.device, *, quick: bool) -> Setting:
    """ViT-S/16 at 224 pixels: bfloat16 on a GPU, float32 elsewhere."""
    gpu = device.type == "cuda"
    if quick:
        return Setting(device, torch.float32, 2, {"img_size": 32, "depth": 2}, 4)
    return Setting(
        device,
        precision=torch.bfloat16 if gpu else torch.float32,
        batch=128 if gpu else 8,
        arguments={},
        views=256 if gpu else 64,
    )


class Steps:
    """The steps of one setting, over the same images, labels and teacher.

    Args:
        folder: an empty one, for the cache.
    """

    def __init__(self, setting: Setting, folder: Path) -> None:
        torch.manual_seed(0)
        self.setting = setting
        shape = (setting.batch, 3, setting.size, setting.size)
        self.images = torch.randn(shape, device=setting.device)
        self.labels = torch.randint(1000, (setting.batch,), device=setting.device)
        self.teacher = timm.create_model(MODEL, **{**setting.arguments, "num_classes": 0})
        self.teacher.to(setting.device).eval().requires_grad_(False)
        self.layers = tuple(range(len(self.teacher.blocks)))
        self.random = np.random.default_rng(0)
        write_cache(folder, self.teacher, self.images[:8], self.layers, setting.views)
        needs = Needs("attention", self.layers)
        self.cached: TeacherSource = CachedTeacher(CacheReader(folder, expect=None), needs)
        self.online: TeacherSource = OnlineTeacher(self.teacher, needs, "float16")

    def plain(self) -> Step:
        """timm's model alone."""
        model = self._model()
        return self._optimised(model, lambda: F.cross_entropy(model(self.images), self.labels))

    def baseline(self, kind: Kind) -> Step:
        """The one of baseline.py."""
        both = Baseline(MODEL, kind, weight=WEIGHT, **self.setting.arguments).to(self.setting.device)
        both.student.train()
        step = self._optimised(both, lambda: both.loss(self.images, self.labels))
        attentions = [module for module in both.modules() if isinstance(module, MapAttention)]

        def step_and_forget() -> None:
            step()
            # The maps of the step before must not count, nor fill the memory while others take their turn.
            for attention in attentions:
                attention.logits = attention.map = attention.replacement = None

        return step_and_forget

    def ours(self, kind: Kind, source: TeacherSource) -> Step:
        """This library's."""
        student = self._model()
        method = self._method(kind, student)
        views, batch = self.setting.views, self.setting.batch

        def loss() -> Tensor:
            examples = self.random.choice(views, batch, replace=batch > views)
            return method.loss(self.images, self.labels, source(self.images, examples, 0)).total

        return self._optimised(student, loss)

    def _model(self) -> nn.Module:
        model: nn.Module = timm.create_model(MODEL, **self.setting.arguments)
        return model.to(self.setting.device).train()

    def _method(self, kind: Kind, student: nn.Module) -> Method:
        if kind == "copy":
            slim(student, self.layers)
            student.to(self.setting.device)
            return AttentionCopy(student, **self._transferred())
        return AttentionDistill(
            student, weight=WEIGHT, reduction="sum", temperature=1.0, **self._transferred()
        )

    def _transferred(self) -> dict[str, Any]:
        """The maps of all heads of all layers."""
        count = self.teacher.blocks[0].attn.num_heads
        return {
            "layers": self.layers,
            "heads": (tuple(range(count)),) * len(self.layers),
            "transfer": "map",
            "student_heads": count,
            "label_smoothing": 0.0,
        }

    def _optimised(self, model: nn.Module, loss: Callable[[], Tensor]) -> Step:
        """Forward, backward and AdamW; gradients are freed at the end."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        precision, kind = self.setting.precision, self.setting.device.type

        def step() -> None:
            with torch.autocast(kind, precision, enabled=precision != torch.float32):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def write_cache(
    folder: Path, teacher: nn.Module, images: Tensor, layers: tuple[int, ...], views: int
) -> Layout:
    """The teacher's attention for so many views: the same images again and again, since bytes are bytes."""
    rows = teacher_attention(teacher, images, layers)
    _, _, depth, heads, tokens, width = rows.shape
    layout = Layout(layers=depth, heads=heads, tokens=tokens, head_dim=width, dtype="float16")
    keys = np.stack([np.arange(views), np.zeros(views, np.int64)], axis=1)
    with CacheWriter(folder, layout=layout, recipe={"benchmark": "steps"}, keys=keys) as writer:
        for piece in writer.pending():
            for start in range(piece.start, piece.stop, len(rows)):
                writer.write(rows[: min(len(rows), piece.stop - start)])
    return layout
