"""Teachers in params.yaml: their architectures, and how they are obtained."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from attention_transfer.config_values import (
    Fraction,
    Positive,
    Rate,
    Section,
    Seed,
    Share,
    divides,
    no_value_twice,
    ordered,
    warms_up,
)

Component = Literal["layer_scale", "registers", "rotary", "relative_bias", "swiglu", "pre_norm", "qk_norm"]
"""What families of pre-trained models have beyond the plain Vision Transformer (paper B)."""
REGISTERS = 4  # tokens, as in Darcet et al., 2024


class Architecture(Section):
    """A Vision Transformer; image size and channels are the data's."""

    patch_size: Positive
    width: Positive
    depth: Positive
    heads: Positive
    mlp_ratio: Rate
    components: tuple[Component, ...] = ()
    """Added to the plain one; see models/vit.py."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        divides("heads", self.heads, "width", self.width)
        no_value_twice("components", self.components)
        beside = {"registers", "rotary", "pre_norm", "qk_norm"} & set(self.components)
        if "relative_bias" in self.components and beside:
            raise ValueError(
                f"components: timm has no model with relative_bias and {', '.join(sorted(beside))}"
            )
        if "rotary" in self.components and (self.width // self.heads) % 4:
            raise ValueError(
                f"heads: rotary needs a multiple of 4 numbers a head, not {self.width // self.heads}"
            )
        return self

    @property
    def registers(self) -> int:
        """Tokens between the class token and the patches."""
        return REGISTERS if "registers" in self.components else 0

    def tokens(self, image_size: int) -> int:
        """Patches, class token and registers of a square image of so many pixels a side."""
        return (image_size // self.patch_size) ** 2 + 1 + self.registers


class Decoder(Section):
    """The masked autoencoder's light decoder."""

    width: Positive
    depth: Positive
    heads: Positive

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        divides("heads", self.heads, "width", self.width)
        return self


class Pretrained(Section):
    """A teacher that is pre-trained here, and what all ways to do that share."""

    architecture: Architecture
    images: Literal["task", "digits", "fractals"] = "task"
    """`task`: the training images, validation left out; else images that have nothing to do with the task."""
    epochs: Positive
    warmup_epochs: Annotated[float, Field(ge=0)]
    batch_size: Positive
    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    crop_scale: tuple[Share, Share]
    seed: Seed

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        ordered("crop_scale", self.crop_scale)
        warms_up(self.warmup_epochs, self.epochs)
        return self

    # The rest of the optimiser's recipe is that of He et al. (2022), appendix A.1, for all of them.
    min_learning_rate: ClassVar[float] = 0.0
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    layer_decay: ClassVar[float] = 1.0
    ema: ClassVar[float | None] = None


class MaskedAutoencoder(Pretrained):
    """Without labels, from some of the patches (He et al., 2022)."""

    kind: Literal["mae"]
    decoder: Decoder
    mask_ratio: Fraction

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.architecture.components:
            raise ValueError(
                f"architecture.components: {list(self.architecture.components)} cannot be pre-trained by mae, "
                "whose encoder sees some of the tokens alone"
            )
        return self


class MaskedImageModelling(Pretrained):
    """Without labels, from images some of whose patches are hidden (SimMIM: Xie et al., 2022)."""

    kind: Literal["simmim"]
    mask_ratio: Fraction


class MomentumContrast(Pretrained):
    """Without labels, by telling views of one image from those of others (MoCo v3: Chen et al., 2021)."""

    kind: Literal["moco_v3"]
    hidden_width: Positive
    projection_width: Positive
    temperature: Annotated[float, Field(gt=0)]
    base_momentum: Share
    frozen_patches: bool


class SelfDistillation(Pretrained):
    """Without labels, by predicting what its own average makes of another view (DINO: Caron et al., 2021)."""

    kind: Literal["dino"]
    hidden_width: Positive
    bottleneck_width: Positive
    prototypes: Positive
    student_temperature: Annotated[float, Field(gt=0)]
    teacher_temperature: Annotated[float, Field(gt=0)]
    centre_momentum: Share
    base_momentum: Share


class GroupClassification(Pretrained):
    """With labels of another kind than the task's: classes merged into groups."""

    kind: Literal["supervised"]
    groups: tuple[Annotated[int, Field(ge=0)], ...]
    """For each class of the task the number of its group."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]

    @model_validator(mode="after")
    def _has_groups(self) -> Self:
        if len(set(self.groups)) < 2 or set(self.groups) != set(range(len(set(self.groups)))):
            raise ValueError(
                f"groups: {list(self.groups)} must number at least two groups from 0 without a gap"
            )
        if self.images != "task":
            raise ValueError(f"images: {self.images} have none of the task's labels")
        return self


class Untrained(Section):
    """A randomly initialised teacher: the control for what pre-training adds."""

    kind: Literal["untrained"]
    architecture: Architecture
    seed: Seed


class FromFile(Section):
    """A teacher that the user brings: weights of timm's VisionTransformer, as safetensors."""

    kind: Literal["file"]
    architecture: Architecture
    path: str
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Of the file: another file is another teacher, and reruns what depends on it."""


Teacher = Annotated[
    MaskedAutoencoder
    | MaskedImageModelling
    | MomentumContrast
    | SelfDistillation
    | GroupClassification
    | Untrained
    | FromFile,
    Field(discriminator="kind"),
]
