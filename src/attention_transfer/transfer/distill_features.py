"""Distillation of features: the residual stream instead of attention (a baseline of paper A, section 4)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer.transfer.method import Given, Loss, Needs


class FeatureDistill:
    """Task loss plus `weight` times the mean squared difference of the features behind each layer.

    Args:
        student: a timm model with `forward_intermediates`.
        layers: same layer to same layer; widths and tokens are equal.
        reduction: over the layers.
    """

    teacher_at_inference = False

    def __init__(
        self,
        student: nn.Module,
        *,
        layers: tuple[int, ...],
        weight: float,
        reduction: Literal["sum", "mean"],
        label_smoothing: float,
    ) -> None:
        self.student = student
        self.weight, self.reduction = weight, reduction
        self.needs = Needs("features", layers)
        self.label_smoothing = label_smoothing

    def train(self) -> None:
        self.student.train()

    def loss(self, images: Tensor, labels: Tensor, given: Given | None) -> Loss:
        if given is None:
            raise ValueError("the distillation of features needs the teacher's features in training")
        final, own = features(self.student, images, self.needs.layers)
        logits = self.student.forward_head(final)  # type: ignore[operator]
        task = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        pairs = zip(own, given.features, strict=True)
        layers = torch.stack([F.mse_loss(mine.float(), theirs.float()) for mine, theirs in pairs])
        loss = layers.sum() if self.reduction == "sum" else layers.mean()
        return Loss(total=task + self.weight * loss, task=task, transfer=loss, transfer_name="feature_loss")

    def logits(self, student: nn.Module, images: Tensor, given: Given | None) -> Tensor:
        return student(images)


def features(model: Any, images: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A timm model's final tokens, and the residual stream behind each layer, prefix tokens first.

    Returns:
        (batch, tokens, width), as `forward_features` gives it, and as many for each layer, before any norm.
    """
    prefixed = model.num_prefix_tokens > 0
    final, found = model.forward_intermediates(
        images, indices=list(layers), return_prefix_tokens=prefixed, norm=False, output_fmt="NLC"
    )
    if not prefixed:  # timm then gives no pairs
        return final, tuple(found)
    return final, tuple(torch.cat([prefix, patches], dim=1) for patches, prefix in found)
