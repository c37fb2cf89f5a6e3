"""Teachers in params.yaml: their architectures, and how they are obtained."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from attention_transfer.config_values import (
    Extended,
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
HUB = "hf-hub:"  # begins a name that is no entry of timm, but a model of the Hub in timm's format

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Release = Literal["timm", "mae", "moco_v3", "dino", "dinov2", "beit", "beit_v2", "deit"]
"""How a project lays out the weights that it releases; see models/releases.py."""


PRETRAINING_IMAGES = ("task", "digits", "fractals")


def _pretraining_images(value: str) -> str:
    if value not in PRETRAINING_IMAGES and "/" not in value:
        raise ValueError(
            f"{value!r} is none of {', '.join(PRETRAINING_IMAGES)}, and no path of images, which has a / in it"
        )
    return value


class Architecture(Extended):
    """A Vision Transformer; image size and channels are the data's."""

    later: ClassVar[tuple[str, ...]] = ("class_token", "register_tokens", "timm")

    patch_size: Positive
    width: Positive
    depth: Positive
    heads: Positive
    mlp_ratio: Rate
    components: tuple[Component, ...] = ()
    """Added to the plain one; see models/vit.py."""
    class_token: bool = True
    """Whether there is one, in front of the patches."""
    register_tokens: Positive | None = None
    """How many the component `registers` adds; left out: 4."""
    timm: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")] | None = None
    """An entry of timm, `vit_base_patch14_dinov2`: the model is built as there, activation, norms, initial values and
    kind of positions included; the keys above must say what timm builds. See docs/teachers.md."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        divides("heads", self.heads, "width", self.width)
        no_value_twice("components", self.components)
        if self.register_tokens is not None and "registers" not in self.components:
            raise ValueError("register_tokens: needs the component registers; add it, or remove this key")
        if self.timm is None:
            self._can_be_put_together()
        return self

    def _can_be_put_together(self) -> None:
        beside = {"registers", "rotary", "pre_norm", "qk_norm"} & set(self.components)
        if "relative_bias" in self.components and beside:
            raise ValueError(
                f"components: timm has no model with relative_bias and {', '.join(sorted(beside))}"
            )
        if "rotary" in self.components and (self.width // self.heads) % 4:
            raise ValueError(
                f"heads: rotary needs a multiple of 4 numbers a head, not {self.width // self.heads}"
            )
        if "relative_bias" in self.components and not self.class_token:
            raise ValueError(
                "class_token: timm has no model with relative_bias and without one but by `timm`"
            )

    @property
    def registers(self) -> int:
        """Tokens between the class token and the patches."""
        return (self.register_tokens or REGISTERS) if "registers" in self.components else 0

    def tokens(self, image_size: int) -> int:
        """Patches, class token and registers of a square image of so many pixels a side."""
        return (image_size // self.patch_size) ** 2 + self.class_token + self.registers

    def flow(self) -> str:
        """As a line of params.yaml, without what may be left out."""
        stated = self.model_dump(mode="json")
        stated["components"] = f"[{', '.join(self.components)}]" if self.components else None
        shown = {
            key: str(value).lower() if isinstance(value, bool) else value for key, value in stated.items()
        }
        return f"{{ {', '.join(f'{key}: {value}' for key, value in shown.items() if value is not None)} }}"


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
    images: Annotated[str, AfterValidator(_pretraining_images)] = "task"
    """`task`: the training images, validation left out; else images that have nothing to do with the task: `digits`,
    `fractals`, or the path of a folder or tar of images, with a `/` in it."""
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
        if self.architecture.timm is not None or not self.architecture.class_token:
            raise ValueError(
                "architecture.timm, class_token: mae pre-trains the plain model; remove these keys"
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


class Published(Extended):
    """A teacher that others have trained, and what it is known by.

    Its weights are fitted to the study when it is obtained: positions resampled to the study's patches, and the
    difference between the normalisation of images that it was trained with and the study's folded into its patch
    projection.
    """

    architecture: Architecture


class FromFile(Published):
    """A teacher that the user brings: weights in a file, safetensors or what PyTorch loads without running code."""

    later: ClassVar[tuple[str, ...]] = ("format", "mean", "std")
    kind: Literal["file"]
    path: str
    sha256: Sha256
    """Of the file: another file is another teacher, and reruns what depends on it."""
    format: Release | None = None
    """Whose layout the file has; left out: as its content shows, or an error where that fits several."""
    mean: tuple[float, float, float] | None = None
    """Of the pixels from 0 to 1 that its teacher expects; left out: that of the format, and of `timm` the study's."""
    std: tuple[Rate, Rate, Rate] | None = None
    """Their standard deviation; stands beside `mean`."""

    @model_validator(mode="after")
    def _whole_normalisation(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean, std: stand together; give both, or none for those of the format")
        return self


class FromTimm(Published):
    """A published teacher by its name in timm, or by the id of a model in timm's format on the Hugging Face Hub."""

    later: ClassVar[tuple[str, ...]] = ("sha256",)
    kind: Literal["timm"]
    name: str
    """`vit_large_patch16_224.mae`, entry and tag, or `hf-hub:owner/model`, also with `@revision`."""
    sha256: Sha256 | None = None
    """Of the file with the weights, which the stage's records name in any case: another file is refused."""

    @model_validator(mode="after")
    def _is_built_by_its_entry(self) -> Self:
        entry = self.architecture.timm
        if not re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+(@[\w.-]+)?|[a-z][a-z0-9_]*\.\w+", self.name):
            raise ValueError(f"name: {self.name!r} is neither <entry>.<tag> of timm nor {HUB}<owner>/<model>")
        if entry is None:
            raise ValueError(
                "architecture.timm: is missing: say by which entry of timm this teacher is built"
            )
        if not self.name.startswith(HUB) and self.name.partition(".")[0] != entry:
            raise ValueError(
                f"architecture.timm: {entry} is not {self.name.partition('.')[0]}, which name speaks of"
            )
        return self


Teacher = Annotated[
    MaskedAutoencoder
    | MaskedImageModelling
    | MomentumContrast
    | SelfDistillation
    | GroupClassification
    | Untrained
    | FromFile
    | FromTimm,
    Field(discriminator="kind"),
]
