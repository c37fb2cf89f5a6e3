"""What a training takes of a GPU's memory, by a formula.

Of each parameter, in bytes: weight 4, gradient 4, AdamW's two averages 8, average of the weights 4 where the run keeps
one, DistributedDataParallel's buckets of gradients 4 where there are several processes, and under bfloat16 a copy of
the weight for the products, 2. Of each parameter of a teacher in the step, 4.

Of each image and block, kept for the backward pass, with T tokens of width D, an MLP of width M, and b bytes a number
(2 under bfloat16, else 4): 8 T D for the inputs of the two norms, which stay in float32, and b T (6 D + 2 M) for the
inputs of the linear layers and of GELU, and for queries, keys, values and result. A layer that copies its map keeps
2 b T D less, but the teacher's queries and keys as they were given, 8 T D, and in the student's format, 2 b T D (none
where that is float32 too); a layer that distils it keeps what was given, and the gradients of its queries and keys,
(b + 4) T D. A scale of each layer (`layer_scale`) keeps 2 b T D; a gated MLP 4 M in place of 2 M; norms of queries and
keys, and rotary embedding, 2 b T D each. With checkpointing a block keeps its input, 4 T D, and what it was given, and
one block at a time the rest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from attention_transfer.config import COPIES_ATTENTION, Architecture, Study
from attention_transfer.measuring import flops_of_runs
from attention_transfer.models import vit
from attention_transfer.plan import attention_source
from attention_transfer.transfer.methods import slimmed_layers

USABLE = 0.9
"""Share of a GPU's memory that a plan fills: CUDA's context, workspaces and gaps take the rest."""


@dataclass(frozen=True)
class Memory:
    """Of one training.

    Attributes:
        parameters: that are trained.
        frozen: parameters of a teacher in the step.
        average: whether an average of the weights is kept.
        bfloat16: whether products run in that format.
        kept: bytes an image that wait for the backward pass.
        recomputed: the same with checkpointing.
        block: parameters of one block.
        saved: parameters of the student that is kept.
    """

    parameters: int
    frozen: int
    average: bool
    bfloat16: bool
    kept: int
    recomputed: int
    block: int
    saved: int

    @property
    def of_a_parameter(self) -> int:
        """Bytes without buckets and copies."""
        return 4 + 4 + 8 + 4 * self.average

    def fixed(self, processes: int, *, sharded: bool) -> int:
        """Bytes whatever the images are.

        Args:
            processes: that train together.
            sharded: whether weights, gradients and AdamW's averages are shared out among them; then a block's weights
                and gradients are whole while it is at work, those of the next with them.
        """
        copies = 2 * self.bfloat16
        teacher = 4 * self.frozen
        if sharded:
            return (
                self.parameters * self.of_a_parameter // processes + 2 * self.block * (8 + copies) + teacher
            )
        return self.parameters * (self.of_a_parameter + 4 * (processes > 1) + copies) + teacher

    def of_an_image(self, *, checkpointing: bool) -> int:
        return self.recomputed if checkpointing else self.kept


def of_run(study: Study, name: str, classes: int) -> Memory:
    """Of training a run's student."""
    run, architecture = study.runs[name], study.architecture(name)
    student = _parameters(study, architecture, classes)
    model = flops_of_runs.model(study, architecture, classes)
    copied, layers = set(slimmed_layers(study, name)), study.layers(name)
    of_a_block = (student - _parameters(study, architecture, classes, depth=0)) // model.depth
    saved = len(copied) * 2 * (model.width**2 + model.width)
    blocks = [_Block.of(study, architecture, copied=layer in copied) for layer in range(model.depth)]
    given = _given(study, name)
    distils = run.method == "distill" and run.transfer == "map"
    extra = given + (blocks[0].number + 4) * model.tokens * model.width if distils else given
    image = model.patches * model.pixels * (4 + blocks[0].number)
    probe = run.method == "linear_probe"
    kept = 0 if probe else sum(block.kept for block in blocks) + extra * len(layers)
    inputs = 4 * model.tokens * model.width * model.depth
    recomputed = 0 if probe else inputs + given * len(layers) + max(block.kept for block in blocks) + extra
    return Memory(
        parameters=2 * model.width + (model.width + 1) * classes if probe else student - saved,
        frozen=_teacher(study, name, classes) + (student if probe else 0),
        average=run.ema is not None,
        bfloat16=study.training.precision == "bfloat16",
        kept=image + kept,
        recomputed=image + recomputed,
        block=0 if probe else of_a_block,
        saved=student - saved,
    )


@dataclass(frozen=True)
class _Block:
    """Bytes an image that one block keeps, and bytes of a number in a product."""

    kept: int
    number: int

    @classmethod
    def of(cls, study: Study, architecture: Architecture, *, copied: bool) -> _Block:
        parts, number = set(architecture.components), 2 if study.training.precision == "bfloat16" else 4
        model = flops_of_runs.model(study, architecture, 0)
        width, gated = model.width, "swiglu" in parts
        hidden = model.mlp // (3 * width if gated else 2 * width)
        numbers = 6 * width + hidden * (4 if gated else 2)
        numbers += 2 * width * (len(parts & {"layer_scale", "qk_norm", "rotary"}))
        numbers -= 2 * width if copied else 0
        return cls(model.tokens * (8 * width + number * numbers), number)


def _given(study: Study, name: str) -> int:
    """Bytes an image of what a layer is given of the teacher."""
    run = study.runs[name]
    teacher = flops_of_runs.model(study, study.teachers[run.teacher].architecture, 0)
    numbers = teacher.tokens * teacher.width
    if run.method == "distill_features":
        return 2 * 4 * numbers  # and the student's own, which the loss keeps
    if run.method not in COPIES_ATTENTION:
        return 0
    cast = 2 * 2 * numbers if run.method == "copy" and study.training.precision == "bfloat16" else 0
    return 2 * 4 * numbers + cast


def _teacher(study: Study, name: str, classes: int) -> int:
    """Parameters of the teacher that runs in the step."""
    run = study.runs[name]
    if run.logit_loss is not None:
        tutor = study.finetuned_teachers[run.logit_loss.teacher].run.teacher
        return _parameters(study, study.teachers[tutor].architecture, classes)
    if flops_of_runs.training(study, name, classes).teacher == 0:
        return 0
    cached = attention_source(study, run.teacher).source == "cache" and run.method in COPIES_ATTENTION
    if cached and run.transfer == "map":
        return 0
    return _parameters(study, study.teachers[run.teacher].architecture, 0)


def parameters(study: Study, teacher: str) -> int:
    """Of a teacher without a head."""
    return _parameters(study, study.teachers[teacher].architecture, 0)


def _parameters(study: Study, architecture: Architecture, classes: int, depth: int | None = None) -> int:
    """Of timm's model; at depth 0 without its blocks."""
    data = study.data
    whole, blocks = _counted(architecture, data.image_size, data.channels, classes)
    return whole - blocks if depth == 0 else whole


@functools.cache
def _counted(architecture: Architecture, image_size: int, channels: int, classes: int) -> tuple[int, int]:
    """Of the whole model, and of its blocks, built without storage."""
    arguments = vit.model_arguments(architecture, image_size=image_size, channels=channels, classes=classes)
    with torch.device("meta"):
        model = vit.create(arguments, seed=0)
    whole, blocks = (
        sum(weight.numel() for weight in module.parameters()) for module in (model, model.blocks)
    )
    return whole, blocks
