"""DINO: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_transfer.models.momentum_network import MomentumNetwork
from attention_transfer.models.projections import project
from attention_transfer.models.vit import ViT


class SelfDistillation(nn.Module):
    """A student predicts from one view what its own moving average, the teacher, says of the other view.

    Centring keeps one prototype from winning everywhere, sharpening (a teacher temperature below the
    student's) keeps all from winning equally: either alone collapses.

    Unlike the paper: two global views only, no small crops; the encoder's mean of patch tokens takes the
    place of its class token; the teacher's
    temperature is constant, without its first epochs' rise from 0.04 to 0.07; the last layer is trained from
    the first step on, as the rest is. The paper evaluates the teacher: that is `teacher.encoder`. Its last
    step is the student's last but one, because a step begins with the teacher's move.

    Args:
        encoder: the student's, trained; a copy of it becomes the teacher's.
        hidden_width, bottleneck_width, prototypes: of the head, 2048, 256 and 65536 in the paper.
        student_temperature, teacher_temperature: 0.1 and 0.04 to 0.07 in the paper.
        centre_momentum: share of the centre that a step keeps, 0.9 in the paper.
        base_momentum: of the teacher at first, 0.996 in the paper; rises to 1 along half a cosine.
        steps: training steps in all.

    Raises:
        ValueError: an argument is out of its range.
    """

    views: ClassVar[int] = 2
    labelled: ClassVar[bool] = False
    centre: Tensor  # (prototypes,) float32, a buffer

    def __init__(
        self,
        encoder: ViT,
        *,
        hidden_width: int,
        bottleneck_width: int,
        prototypes: int,
        student_temperature: float,
        teacher_temperature: float,
        centre_momentum: float,
        base_momentum: float,
        steps: int,
    ) -> None:
        super().__init__()
        for name, value in (
            ("student_temperature", student_temperature),
            ("teacher_temperature", teacher_temperature),
        ):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= centre_momentum <= 1:
            raise ValueError(f"centre_momentum: expected a number in [0, 1], got {centre_momentum}")
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.centre_momentum = centre_momentum
        self.encoder = encoder
        self.head = PrototypeHead(
            encoder.num_features,
            hidden_width=hidden_width,
            bottleneck_width=bottleneck_width,
            prototypes=prototypes,
        )
        self.teacher = MomentumNetwork(encoder, self.head, base_momentum=base_momentum, steps=steps)
        self.register_buffer("centre", torch.zeros(prototypes))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Mean of both directions; in training mode the teacher moves before, and the centre after.

        Args:
            first, second: views (batch, channels, size, size) of the same images in the same order.

        Raises:
            ValueError: the views' shapes differ.
        """
        views = (first, second)
        if self.training:
            self.teacher.update(self.encoder, self.head)
        teacher = self.teacher(views)
        student = project(self.encoder, self.head, views)
        loss = (self._cross_entropy(teacher[0], student[1]) + self._cross_entropy(teacher[1], student[0])) / 2
        if self.training:
            self.centre.lerp_(torch.cat(teacher).mean(dim=0), 1 - self.centre_momentum)
        return loss

    def _cross_entropy(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Between centred and sharpened teacher and student (algorithm 1); both (batch, prototypes)."""
        targets = ((teacher - self.centre) / self.teacher_temperature).softmax(dim=1)
        return F.cross_entropy(student / self.student_temperature, targets)


class PrototypeHead(nn.Module):
    """Cosines of a bottleneck's output with learned prototypes, in float32.

    A last layer with weight norm whose gain is fixed at 1 (the authors' default) is just this. Temperatures
    will divide the cosines by a few hundredths, which bfloat16's eight bits would not bear.
    """

    def __init__(self, width: int, *, hidden_width: int, bottleneck_width: int, prototypes: int) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.Linear(width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, bottleneck_width),
        )
        self.prototypes = nn.Linear(bottleneck_width, prototypes, bias=False)
        for layer in self.bottleneck:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, width) to (batch, prototypes), each in [-1, 1]."""
        directions = self.bottleneck(features)
        with torch.autocast(features.device.type, enabled=False):
            prototypes = F.normalize(self.prototypes.weight, dim=1)
            return F.linear(F.normalize(directions.float(), dim=1), prototypes)
