"""Entries of `runs` in params.yaml, one per way to train a student; their defaults are part of what a run is."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from attention_transfer.config_teachers import Architecture
from attention_transfer.config_values import (
    Extended,
    Fraction,
    Name,
    Positive,
    Rate,
    Section,
    Seed,
    warms_up,
)

Method = Literal[
    "scratch", "finetune", "linear_probe", "copy", "distill", "distill_features", "distill_logits"
]
COPIES_ATTENTION = ("copy", "distill")


class AttentionLoss(Section):
    """Distance between the teacher's and the student's attention: the loss of Attention Distill.

    Maps are compared by cross-entropy; queries, keys and values by their mean squared difference.
    """

    weight: Annotated[float, Field(gt=0)]
    reduction: Literal["sum", "mean"] = "sum"
    """Over layers: `sum` as in the official code, or `mean`."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of both maps."""


class FeatureLoss(Section):
    """Mean squared difference of the residual stream behind each transferred layer."""

    weight: Annotated[float, Field(gt=0)]
    reduction: Literal["sum", "mean"] = "mean"
    """Over layers."""


class LogitLoss(Section):
    """Cross-entropy between the teacher's and the student's predictions (Hinton et al., 2015)."""

    weight: Annotated[float, Field(gt=0)]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both logits; the loss is multiplied by its square, which keeps the gradient's size."""
    teacher: Name
    """One of `finetuned_teachers`: a pre-trained teacher alone predicts no classes."""


Layer = Annotated[int, Field(ge=0)]


class Run(Extended):
    """One way to train a student."""

    later: ClassVar[tuple[str, ...]] = ("shares_stochastic_depth",)

    method: Method
    teacher: Name
    """Whose weights, attention or features the method uses."""
    architecture: Architecture | None = None
    """The student's; None: the teacher's."""
    initial: Name | None = None
    """A teacher whose weights the student starts from; None: fresh ones (fine-tuning and probing: `teacher`)."""
    transfer: Literal["map", "query", "key", "value"] = "map"
    """copy, distill: what of the teacher's attention is handed over."""
    layers: Literal["all"] | tuple[Layer, ...] | None = None
    """copy, distill, distill_features: which layers are transferred, counted from 0 at the input."""
    heads: Literal["all"] | tuple[Layer, ...] = "all"
    """copy, distill: which heads of every transferred layer; the others stay the student's own."""
    heads_per_layer: tuple[tuple[Layer, ...], ...] | None = None
    """Instead of `heads`: one list of heads for each of `layers`, in order from the input."""
    average: Literal["examples", "queries", "heads", "layers"] | None = None
    """copy, distill: the teacher's maps are replaced by their mean over this (an ablation of paper A)."""
    attention_loss: AttentionLoss | None = None
    """distill only."""
    feature_loss: FeatureLoss | None = None
    """distill_features only."""
    logit_loss: LogitLoss | None = None
    """distill_logits only."""
    learning_rate: Rate
    """Peak learning rate."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine schedule."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from one layer to the one below it."""
    epochs: Positive
    warmup_epochs: Annotated[float, Field(ge=0)] = 5.0
    batch_size: Positive
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    shares_stochastic_depth: bool = False
    """copy, distill: in training the teacher drops the branches that the student drops, as in the official code."""
    ema: Fraction | None = None
    """Decay of the exponential moving average of the weights; its weights then count as the run's."""

    @model_validator(mode="after")
    def _only_what_the_method_reads(self) -> Self:
        needs_layers = self.method in (*COPIES_ATTENTION, "distill_features")
        if needs_layers and not self.layers:
            raise ValueError(f"layers: method {self.method} needs the layers to transfer: all, or a list")
        if not needs_layers and self.layers is not None:
            raise ValueError(f"layers: method {self.method} transfers no attention; remove this key")
        for key, method in (
            ("attention_loss", "distill"),
            ("feature_loss", "distill_features"),
            ("logit_loss", "distill_logits"),
        ):
            if (self.method == method) != (getattr(self, key) is not None):
                raise ValueError(f"{key}: needed by method {method}, and by no other")
        if self.method not in COPIES_ATTENTION:
            for key, default in (
                ("transfer", "map"),
                ("heads", "all"),
                ("heads_per_layer", None),
                ("average", None),
                ("shares_stochastic_depth", False),
            ):
                if getattr(self, key) != default:
                    raise ValueError(f"{key}: method {self.method} transfers no attention; remove this key")
        if self.method in ("finetune", "linear_probe"):
            for key in ("architecture", "initial"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: method {self.method} starts from its teacher; remove this key")
        self._consistent_transfer()
        if self.method == "linear_probe" and (self.layer_decay != 1.0 or self.drop_path != 0.0):
            raise ValueError("layer_decay, drop_path: linear_probe trains the head alone; remove these keys")
        if self.shares_stochastic_depth and self.drop_path == 0:
            raise ValueError(
                "shares_stochastic_depth: drop_path is 0: nothing is dropped; set it, or remove this key"
            )
        warms_up(self.warmup_epochs, self.epochs)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate: larger than learning_rate")
        return self

    def _consistent_transfer(self) -> None:
        for key, chosen in (
            ("layers", self.layers),
            ("heads", self.heads),
            *(("heads_per_layer", heads) for heads in self.heads_per_layer or ()),
        ):
            if isinstance(chosen, tuple) and len(set(chosen)) != len(chosen):
                raise ValueError(f"{key}: {list(chosen)} names a {key[:5].rstrip('s')} twice")
            if chosen == ():
                raise ValueError(f"{key}: is empty; at least one is needed")
        if self.heads_per_layer is not None:
            if self.heads != "all":
                raise ValueError("heads_per_layer: stands instead of heads; remove one of them")
            if not isinstance(self.layers, tuple) or len(self.heads_per_layer) != len(self.layers):
                raise ValueError(
                    f"heads_per_layer: {len(self.heads_per_layer)} lists; layers must be a list of as many"
                )
            if list(self.layers) != sorted(self.layers):
                raise ValueError("layers: must stand in order from the input beside heads_per_layer")
        temperature = self.attention_loss.temperature if self.attention_loss else 1.0
        for key, given in (("average", self.average), ("attention_loss.temperature", temperature)):
            if self.transfer != "map" and given not in (None, 1.0):
                raise ValueError(f"{key}: concerns maps, and transfer is {self.transfer}; remove this key")
        if self.shares_stochastic_depth and self.average == "examples":
            raise ValueError(
                "shares_stochastic_depth: the mean over examples is taken before the training; remove this key"
            )
        if self.average is not None and temperature != 1.0:
            raise ValueError(
                "average: a mean of maps has no temperature; leave attention_loss.temperature out"
            )


class FinetunedTeacher(Section):
    """A teacher with a classification head: one more student of a run that fine-tunes, frozen."""

    seed: Seed
    run: Run
    """Of method finetune: which teacher, and the recipe."""

    @model_validator(mode="after")
    def _finetunes(self) -> Self:
        if self.run.method != "finetune":
            raise ValueError(f"run.method: {self.run.method} is not finetune")
        return self
