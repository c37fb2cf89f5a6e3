"""What the heads of the pre-training methods start from: pooled features of the views of each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attention_transfer.models.vit import ViT


def pooled(encoder: ViT, images: Tensor) -> Tensor:
    """Pooled and normalised features as a classification head would get them: (batch, width).

    Args:
        images: (batch, channels, size, size).
    """
    features: Tensor = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
    return features


def project(encoder: ViT, projector: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """The projection of each view's pooled features, (batch, projection width) each.

    The encoder sees all views as one batch. The projector sees one view at a time, so that batch statistics
    are those of one view.

    Args:
        views: (batch, channels, size, size) each; image i of one is another view of image i of the others.

    Raises:
        ValueError: the views' shapes differ.
    """
    if len({view.shape for view in views}) != 1:
        found = " and ".join(str(tuple(view.shape)) for view in views)
        raise ValueError(f"views: expected one shape, (batch, channels, size, size), got {found}")
    features = pooled(encoder, torch.cat(tuple(views)))
    return [projector(of_view) for of_view in features.chunk(len(views))]
