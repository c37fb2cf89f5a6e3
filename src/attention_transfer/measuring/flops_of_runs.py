"""Floating-point operations of a study's runs, predictions and teachers, by image; see flops.py for what counts."""

from __future__ import annotations

from dataclasses import dataclass

from attention_transfer.config import (
    COPIES_ATTENTION,
    Architecture,
    GroupClassification,
    MaskedAutoencoder,
    MaskedImageModelling,
    MomentumContrast,
    Pretrained,
    SelfDistillation,
    Study,
)
from attention_transfer.measuring import flops
from attention_transfer.measuring.flops import Model
from attention_transfer.plan import attention_source
from attention_transfer.transfer.attention_copy import NEEDED
from attention_transfer.transfer.methods import slimmed_layers

DECODER_MLP = 4  # width of the masked autoencoder's MLPs over that of its decoder: timm's default


@dataclass(frozen=True)
class Work:
    """Of one image.

    Attributes:
        student: its own passes.
        teacher: the teacher's pass in the step, and the logits of its attention where a cache holds no maps.
    """

    student: int
    teacher: int = 0

    @property
    def both(self) -> int:
        return self.student + self.teacher


def model(study: Study, architecture: Architecture, classes: int) -> Model:
    """Of an architecture, for the study's images."""
    data = study.data
    return Model.of(architecture, image_size=data.image_size, channels=data.channels, classes=classes)


def training(study: Study, name: str, classes: int) -> Work:
    """A run's forward and backward pass.

    Of heads or parts of the attention that are copied alone, the student's own are counted as if they were all used.
    """
    run, student = study.runs[name], model(study, study.architecture(name), classes)
    if run.method == "linear_probe":
        return Work(student.forward + 2 * student.head)
    saved = flops.copied(student, len(slimmed_layers(study, name)))
    return Work(student.training - saved, _teaching(study, name, classes, cached=True))


def predicting(study: Study, name: str, classes: int, *, cached: bool) -> Work:
    """A run's student on one image.

    Args:
        cached: whether the image is one of those whose attention is in the cache, where there is one.
    """
    run, student = study.runs[name], model(study, study.architecture(name), classes)
    saved = flops.copied_forward(student, len(slimmed_layers(study, name)))
    teacher = _teaching(study, name, classes, cached=cached) if run.method == "copy" else 0
    return Work(student.forward - saved, teacher)


def reading(study: Study, teacher: str) -> int:
    """A teacher's pass that gives the attention of all of its layers, for the cache."""
    found = model(study, study.teachers[teacher].architecture, 0)
    return found.read(found.depth - 1) - found.product


def _teaching(study: Study, name: str, classes: int, *, cached: bool) -> int:
    run, layers = study.runs[name], study.layers(name)
    if run.logit_loss is not None:
        tutor = study.finetuned_teachers[run.logit_loss.teacher].run.teacher
        return model(study, study.teachers[tutor].architecture, classes).forward
    teacher = model(study, study.teachers[run.teacher].architecture, 0)
    if run.method == "distill_features":
        return teacher.forward
    if run.method not in COPIES_ATTENTION or run.average == "examples":  # the same maps for every image
        return 0
    what, content = NEEDED[run.transfer], study.attention.content
    stored = what in ("attention", content)  # as transfer/teacher_source.py: is_cached
    if cached and stored and attention_source(study, run.teacher).source == "cache":
        return len(layers) * teacher.product if (what, content) == ("attention", "queries_and_keys") else 0
    return teacher.read(max(layers))


def pretraining(study: Study, name: str) -> int:
    """Forward and backward pass of a teacher that is pre-trained here, for one image, all of its views; else 0."""
    teacher = study.teachers[name]
    if not isinstance(teacher, Pretrained):
        return 0
    encoder = model(study, teacher.architecture, 0)
    match teacher:
        case MaskedAutoencoder():
            return _masked_autoencoder(teacher, encoder)
        case MaskedImageModelling():
            head = encoder.patches * flops.perceptron(encoder.width, encoder.pixels)
            return 3 * (encoder.forward + head)  # the pixels in place of hidden patches are learned
        case MomentumContrast():
            width, hidden, projection = encoder.width, teacher.hidden_width, teacher.projection_width
            projector = flops.perceptron(width, hidden, hidden, projection)
            predictor = flops.perceptron(projection, hidden, projection)
            contrast = 2 * teacher.batch_size * projection
            trained = encoder.training - (encoder.embedding if teacher.frozen_patches else 0)
            momentum = encoder.forward + projector
            return 2 * (trained + 3 * (projector + predictor) + momentum + 2 * contrast)
        case SelfDistillation():
            hidden, bottleneck = teacher.hidden_width, teacher.bottleneck_width
            head = flops.perceptron(encoder.width, hidden, hidden, bottleneck, teacher.prototypes)
            return 2 * (encoder.training + encoder.forward + 4 * head)
        case GroupClassification():
            return encoder.training + 3 * flops.perceptron(encoder.width, len(set(teacher.groups)))
    raise TypeError(f"{type(teacher).__name__} is not pre-trained here")


def _masked_autoencoder(teacher: MaskedAutoencoder, encoder: Model) -> int:
    seen, decoder = visible(teacher, encoder) + 1, decoder_of(teacher, encoder)
    blocks = (
        encoder.depth
        * Model(encoder.patches, encoder.pixels, seen, encoder.width, encoder.depth, encoder.mlp, 0).block
    )
    joints = seen * flops.perceptron(encoder.width, decoder.width)
    pixels = decoder.tokens * flops.perceptron(decoder.width, encoder.pixels)
    return 2 * encoder.embedding + 3 * (blocks + joints + decoder.depth * decoder.block + pixels)


def visible(teacher: MaskedAutoencoder, encoder: Model) -> int:
    """Patches that the encoder sees; as models/masked_autoencoder.py."""
    return max(1, min(encoder.patches - 1, round(encoder.patches * (1 - teacher.mask_ratio))))


def decoder_of(teacher: MaskedAutoencoder, encoder: Model) -> Model:
    """The masked autoencoder's decoder."""
    width, depth = teacher.decoder.width, teacher.decoder.depth
    mlp = 2 * DECODER_MLP * width**2
    return Model(encoder.patches, encoder.pixels, encoder.patches + 1, width, depth, mlp, 0)
