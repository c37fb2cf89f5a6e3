"""What pre-trains a teacher: one module for each kind in params.yaml."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from attention_transfer import config
from attention_transfer.models import vit
from attention_transfer.models.group_classification import GroupClassification
from attention_transfer.models.masked_autoencoder import MaskedAutoencoder
from attention_transfer.models.masked_image_modelling import MaskedImageModelling
from attention_transfer.models.momentum_contrast import MomentumContrast
from attention_transfer.models.self_distillation import SelfDistillation


class Pretraining(Protocol):
    """A module whose call gives the loss of a batch.

    Attributes:
        encoder: what is trained.
        views: how many views of each image a call takes.
        labelled: whether the labels come behind the views.
    """

    encoder: nn.Module
    views: int
    labelled: bool

    def __call__(self, *batch: Tensor) -> Tensor: ...


def build(params: config.Pretrained, arguments: vit.Arguments, *, steps: int) -> nn.Module:
    """The `Pretraining` that params.yaml asks for, with weights drawn from its seed.

    Args:
        arguments: of the encoder.
        steps: of the whole training, over which momentum networks slow down.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        encoder = vit.create(arguments, seed=params.seed)
        match params:
            case config.MaskedAutoencoder():
                return MaskedAutoencoder(
                    encoder,
                    decoder_width=params.decoder.width,
                    decoder_depth=params.decoder.depth,
                    decoder_heads=params.decoder.heads,
                    mask_ratio=params.mask_ratio,
                )
            case config.MaskedImageModelling():
                return MaskedImageModelling(encoder, mask_ratio=params.mask_ratio)
            case config.MomentumContrast():
                return MomentumContrast(
                    encoder,
                    hidden_width=params.hidden_width,
                    projection_width=params.projection_width,
                    temperature=params.temperature,
                    base_momentum=params.base_momentum,
                    frozen_patches=params.frozen_patches,
                    steps=steps,
                )
            case config.SelfDistillation():
                return SelfDistillation(
                    encoder,
                    hidden_width=params.hidden_width,
                    bottleneck_width=params.bottleneck_width,
                    prototypes=params.prototypes,
                    student_temperature=params.student_temperature,
                    teacher_temperature=params.teacher_temperature,
                    centre_momentum=params.centre_momentum,
                    base_momentum=params.base_momentum,
                    steps=steps,
                )
            case config.GroupClassification():
                return GroupClassification(
                    encoder, groups=params.groups, label_smoothing=params.label_smoothing
                )
    raise TypeError(f"{type(params).__name__} is not pre-trained here")


def result(model: nn.Module) -> nn.Module:
    """The encoder that becomes a teacher: the trained one; of DINO its moving average, which the paper evaluates."""
    chosen = model.teacher if isinstance(model, SelfDistillation) else model
    encoder: nn.Module = chosen.encoder  # type: ignore[assignment]
    return encoder
