"""MoCo v3: Chen, Xie, He, An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_transfer.models.momentum_network import MomentumNetwork
from attention_transfer.models.projections import project
from attention_transfer.models.vit import ViT


class MomentumContrast(nn.Module):
    """One view must find the other view of its image, as the momentum network sees it, among the batch.

    As in the paper: projector of three and predictor of two layers, batch norm after all of them, without
    scale and shift after the last. Unlike the paper: the encoder's mean of patch tokens takes the place of its
    class token, and its position embedding is its own (fixed sines and cosines there).

    Args:
        encoder: trained; a copy of it becomes the momentum network.
        hidden_width, projection_width: of both heads, 4096 and 256 in the paper.
        temperature: of the contrast, 0.2 in the paper.
        base_momentum: of the momentum network at first, 0.99 in the paper; rises to 1 along half a cosine.
        steps: training steps in all.
        frozen_patches: whether the patch projection keeps its random weights, which makes training stable
           . Freezes them in the encoder that is given.

    Raises:
        ValueError: an argument is out of its range.
    """

    views: ClassVar[int] = 2
    labelled: ClassVar[bool] = False

    def __init__(
        self,
        encoder: ViT,
        *,
        hidden_width: int,
        projection_width: int,
        temperature: float,
        base_momentum: float,
        steps: int,
        frozen_patches: bool,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if frozen_patches:
            encoder.patch_embed.requires_grad_(False)
        self.temperature = temperature
        self.encoder = encoder
        self.projector = normalised_mlp(encoder.num_features, hidden_width, hidden_width, projection_width)
        self.predictor = normalised_mlp(projection_width, hidden_width, projection_width)
        self.momentum_network = MomentumNetwork(
            encoder, self.projector, base_momentum=base_momentum, steps=steps
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Symmetrised loss; in training mode a step of the momentum network comes first.

        Args:
            first, second: views (batch, channels, size, size) of the same images in the same order; in
                training mode at least two, for batch norm.

        Raises:
            ValueError: the views' shapes differ, or one image in training mode.
        """
        views = (first, second)
        if self.training:
            self.momentum_network.update(self.encoder, self.projector)
        keys = self.momentum_network(views)
        queries = [self.predictor(projection) for projection in project(self.encoder, self.projector, views)]
        return contrast(queries[0], keys[1], self.temperature) + contrast(
            queries[1], keys[0], self.temperature
        )


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE over cosines times twice the temperature (algorithm 1), in float32.

    Args:
        queries, keys: (batch, width); key i is the one that query i should find.
    """
    with torch.autocast(queries.device.type, enabled=False):
        cosines = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T
        own = torch.arange(len(queries), device=queries.device)
        return 2 * temperature * F.cross_entropy(cosines / temperature, own)


def normalised_mlp(*widths: int) -> nn.Sequential:
    """Linear layers, each with batch norm, ReLU between them; no scale and shift at the end."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        last = number == len(widths) - 1
        # Batch norm takes any bias away again.
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, affine=not last)]
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
