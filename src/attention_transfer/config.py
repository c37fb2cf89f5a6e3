"""params.yaml as frozen, validated dataclasses: the only reader of that file, the only defaults.

`load` checks the whole file, relations between its keys included, before any stage works. Only
`runs` have defaults, and the stage `resolve` writes each run's resolved values to a file that
training depends on: a changed default reruns what it changes. Elsewhere a key may be left out where
that says what it means: no components, the task's own images to pre-train on.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from attention_transfer import params_yaml
from attention_transfer.config_teachers import (
    Architecture,
    Component,
    Decoder,
    FromFile,
    GroupClassification,
    MaskedAutoencoder,
    MaskedImageModelling,
    MomentumContrast,
    Pretrained,
    SelfDistillation,
    Teacher,
    Untrained,
)
from attention_transfer.config_values import (
    Fraction,
    Name,
    Positive,
    Probability,
    Rate,
    Section,
    Seed,
    Share,
    StudyName,
    divides,
    no_value_twice,
    ordered,
    warms_up,
)
from attention_transfer.errors import StudyError

__all__ = [
    "Architecture",
    "Component",
    "FromFile",
    "GroupClassification",
    "MaskedAutoencoder",
    "MaskedImageModelling",
    "MomentumContrast",
    "Pretrained",
    "SelfDistillation",
    "Study",
    "Untrained",
    "experiments",
    "load",
]

Method = Literal[
    "scratch", "finetune", "linear_probe", "copy", "distill", "distill_features", "distill_logits"
]
COPIES_ATTENTION = ("copy", "distill")
Shift = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "motion_blur",
    "zoom_blur",
    "fog",
    "snow",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg",
    "elastic",
    "rotate",
    "translate",
]
SHIFTS: tuple[str, ...] = get_args(Shift)
SMALLEST_SHIFTED = 16  # pixels: below that, blurs and noise of these strengths leave no image


BUILT_IN = ("fashion-mnist", "digits")  # data sets that need no timm


class Data(Section):
    """Which images, and how they are split."""

    source: str
    """`fashion-mnist`, `digits`, or any name that `timm.data.create_dataset` opens as a map-style data set."""
    folder: str
    """Where the files lie; a download goes there too. Digits, those of scikit-learn, come with it."""
    train_split: str
    """Split from which labelled, validation and pre-training images are drawn."""
    test_split: str
    """Split that nothing but the evaluation reads."""
    image_size: Positive
    """Side of the square images, in pixels; other sizes are resized and centre-cropped."""
    channels: Literal[1, 3]
    labelled: Positive
    """Labelled training images, drawn in the classes' proportions."""
    validation: Positive
    """Images on which choices are made; left out of pre-training."""
    seed: Seed
    """Draw of the splits, and of the training views."""

    @model_validator(mode="after")
    def _two_splits(self) -> Self:
        if self.train_split == self.test_split:
            raise ValueError(f"test_split: {self.test_split!r} is the training split too")
        if self.source in BUILT_IN and (self.train_split, self.test_split) != ("train", "test"):
            raise ValueError(f"train_split, test_split: those of {self.source} are called train and test")
        return self


class Views(Section):
    """Training views: view k of image i is a pure function of (data set, i, k, data.seed)."""

    per_image: Positive
    """Number K of views of each image: epoch e shows view e mod K."""
    crop_scale: tuple[Share, Share]
    """Area of the crop, as a share of the image: smallest, largest."""
    crop_ratio: tuple[Rate, Rate]
    """Width over height of the crop: smallest, largest."""
    flip: Probability
    """Probability of a horizontal flip."""
    erase: Probability
    """Probability that a rectangle is replaced by the mean colour."""
    mixup: Annotated[float, Field(ge=0, le=100)]
    """Parameter of the Beta distribution by which two images of a view are blended; 0: never."""
    cutmix: Annotated[float, Field(ge=0, le=100)]
    """The same for a rectangle of one image in another; with both, each pair takes one of them."""

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ordered("crop_scale", self.crop_scale)
        ordered("crop_ratio", self.crop_ratio)
        return self


class AttentionCache(Section):
    """How students get at the teacher's attention."""

    source: Literal["cache", "online", "auto"]
    """`cache`: read from disk; `online`: the frozen teacher runs in every step; `auto`: `plan.choose`."""
    content: Literal["queries_and_keys", "maps"]
    """What is stored of it; maps are larger, and serve transfer: map alone."""
    dtype: Literal["float16", "float32", "int8"]
    """Number format of what is stored, in the cache and online alike; int8 with a scale per vector."""
    budget_gb: Annotated[float, Field(gt=0)]
    """The cache of training views may take so many GB (10^9 bytes)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.content == "maps" and self.dtype == "int8":
            raise ValueError("dtype: maps are stored as floats: choose float16 or float32")
        return self


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


class Run(Section):
    """One way to train a student."""

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


class Training(Section):
    """What all runs share."""

    precision: Literal["float32", "bfloat16"]
    """Matrix products and attention run in this format; weights and losses stay in float32."""
    clip_norm: Annotated[float, Field(gt=0)] | None
    """Gradients are scaled down to this norm."""
    validate_every: Positive
    """Epochs from one point of the validation curve to the next; the last epoch always has one."""
    curve_images: Positive
    """The first so many validation images make the curve; a trained student is scored on all of them."""


class Evaluation(Section):
    """What the predictions are made on and how they are judged."""

    sets: tuple[Literal["validation", "test", "shifts", "digits"], ...]
    """Image sets to predict on; a study that chooses hyper-parameters names `validation` alone."""
    shifts: tuple[Shift, ...]
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...]
    shift_images: Positive
    """Test images, the same ones for each shift, drawn stratified."""
    calibration_bins: Positive
    """Equally wide bins of the expected calibration error."""
    confidence: Fraction
    """Level of all intervals."""
    bootstrap: Positive
    """Resamples of the bootstrap over seeds and examples."""


class Ensemble(Section):
    """Average of two runs' predicted probabilities."""

    members: tuple[Name, Name]
    """Two runs of the same seed; a run with itself is paired with its next seed."""


class Report(Section):
    """Which runs play which part in the tables and claims."""

    scratch: Name
    finetune: Name
    copied: Name
    distilled: Name
    attention_images: Positive
    """Images whose attention maps are drawn."""
    equivalence_margin: Fraction
    """Accuracies closer than this count as equal."""


class Study(Section):
    """A whole params.yaml, or an experiment with what it takes from the study that it extends."""

    name: StudyName
    experiments: tuple[Name, ...]
    """Further runs on this study's data and teachers: each in a file of its own, see `experiments`; [] for none."""
    seeds: tuple[Seed, ...]
    data: Data
    views: Views
    attention: AttentionCache
    training: Training
    teachers: dict[Name, Teacher]
    finetuned_teachers: dict[Name, FinetunedTeacher]
    """For the distillation of logits; {} for none."""
    runs: dict[Name, Run]
    evaluation: Evaluation
    ensembles: dict[Name, Ensemble]
    report: Report | None
    """None: a study without the main comparison, such as a search for hyper-parameters."""
    _own_data: bool = PrivateAttr(default=False)

    @property
    def own_data(self) -> bool:
        """Whether it is an experiment with other images, or another draw of them, than the study that it extends."""
        return self._own_data

    @property
    def is_experiment(self) -> bool:
        """Whether it extends another study: <study>/<experiment> is its name."""
        return "/" in self.name

    @property
    def cached_teachers(self) -> tuple[str, ...]:
        """Whose attention is cached: all; for an experiment with data of its own, those of its runs."""
        used = {run.teacher for run in self.runs.values()}
        return tuple(name for name in self.teachers if name in used or not self.own_data)

    @property
    def transferred_from(self) -> tuple[str, ...]:
        """Teachers whose attention, features or weights the runs take."""
        used = {name for run in self.runs.values() for name in (run.teacher, run.initial)}
        return tuple(name for name in self.teachers if name in used)

    @property
    def finetuned_from(self) -> tuple[str, ...]:
        """Teachers that `finetuned_teachers` start from."""
        used = {tutor.run.teacher for tutor in self.finetuned_teachers.values()}
        return tuple(name for name in self.teachers if name in used)

    @property
    def has_logit_losses(self) -> bool:
        """Whether a run learns the predictions of one of `finetuned_teachers`."""
        return any(run.logit_loss is not None for run in self.runs.values())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key in ("seeds", "teachers", "runs"):
            if not getattr(self, key):
                raise ValueError(f"{key}: is empty; at least one is needed")
        for key, values in (
            ("seeds", self.seeds),
            ("experiments", self.experiments),
            ("evaluation.sets", self.evaluation.sets),
            ("evaluation.shifts", self.evaluation.shifts),
            ("evaluation.severities", self.evaluation.severities),
        ):
            no_value_twice(key, values)
        if self.training.curve_images > self.data.validation:
            raise ValueError(
                f"training.curve_images: {self.training.curve_images} is more than the "
                f"{self.data.validation} validation images"
            )
        for name, teacher in self.teachers.items():
            key, patch_size = f"teachers.{name}.architecture.patch_size", teacher.architecture.patch_size
            divides(key, patch_size, "data.image_size", self.data.image_size)
        for name, run in self.runs.items():
            self._fits_its_teacher(name, run)
            self._has_room_for_a_batch(f"runs.{name}", run)
        for name, tutor in self.finetuned_teachers.items():
            _known(f"finetuned_teachers.{name}.run.teacher", tutor.run.teacher, self.teachers)
            self._has_room_for_a_batch(f"finetuned_teachers.{name}.run", tutor.run)
        for name, ensemble in self.ensembles.items():
            for member in ensemble.members:
                _known(f"ensembles.{name}.members", member, self.runs)
            if ensemble.members[0] == ensemble.members[1] and len(self.seeds) < 2:
                raise ValueError(f"ensembles.{name}: two members of one run need two seeds")
        if self.report is not None:
            for part in ("scratch", "finetune", "copied", "distilled"):
                _known(f"report.{part}", getattr(self.report, part), self.runs)
        if "shifts" in self.evaluation.sets and self.data.image_size < SMALLEST_SHIFTED:
            raise ValueError(
                f"data.image_size: {self.data.image_size} is too small for evaluation.sets: shifts, "
                f"which need {SMALLEST_SHIFTED} pixels"
            )
        if "shifts" in self.evaluation.sets and not (self.evaluation.shifts and self.evaluation.severities):
            raise ValueError("evaluation.shifts: is empty although evaluation.sets names shifts")
        return self

    def _has_room_for_a_batch(self, key: str, run: Run) -> None:
        if run.batch_size > self.data.labelled:
            raise ValueError(
                f"{key}.batch_size: {run.batch_size} is more than the {self.data.labelled} labelled images"
            )
        if self.views.mixes and run.batch_size % 2:
            raise ValueError(
                f"{key}.batch_size: {run.batch_size} is odd, but views.mixup and views.cutmix mix pairs"
            )

    def _fits_its_teacher(self, name: str, run: Run) -> None:
        _known(f"runs.{name}.teacher", run.teacher, self.teachers)
        if run.logit_loss is not None:
            _known(f"runs.{name}.logit_loss.teacher", run.logit_loss.teacher, self.finetuned_teachers)
        teacher, student = self.teachers[run.teacher].architecture, self.architecture(name)
        if run.initial is not None:
            _known(f"runs.{name}.initial", run.initial, self.teachers)
            if (initial := self.teachers[run.initial].architecture) != student:
                raise ValueError(f"runs.{name}.initial: {run.initial} has another architecture, {initial}")
        divides(
            f"runs.{name}.architecture.patch_size",
            student.patch_size,
            "data.image_size",
            self.data.image_size,
        )
        if run.method not in (*COPIES_ATTENTION, "distill_features"):
            return
        if run.layers == "all" and student.depth > teacher.depth:
            raise ValueError(
                f"runs.{name}.layers: all are the student's {student.depth}, the teacher has {teacher.depth}"
            )
        depth = min(teacher.depth, student.depth)
        chosen = run.layers if isinstance(run.layers, tuple) else ()
        if beyond := [layer for layer in chosen if layer >= depth]:
            whose = "teacher" if teacher.depth <= student.depth else "student"
            raise ValueError(
                f"runs.{name}.layers: {beyond} lie beyond the {whose}'s {depth} layers, 0 to {depth - 1}"
            )
        if teacher.patch_size != student.patch_size:
            raise ValueError(
                f"runs.{name}.architecture.patch_size: {student.patch_size} makes other tokens than the "
                f"teacher's {teacher.patch_size}"
            )
        if student.registers > teacher.registers:
            raise ValueError(
                f"runs.{name}.architecture.components: the student's registers have no counterparts in the teacher"
            )
        if run.method == "distill_features":
            if teacher.registers != student.registers:
                raise ValueError(
                    f"runs.{name}.architecture.components: features of a teacher with registers need a student "
                    "with registers"
                )
            if teacher.width != student.width:
                raise ValueError(
                    f"runs.{name}.architecture.width: {student.width} is not the teacher's, {teacher.width}, "
                    "whose features are compared one by one"
                )
            return
        heads = (teacher.heads, student.heads)
        if run.transfer != "map" and (*heads[:1], teacher.width) != (*heads[1:], student.width):
            raise ValueError(
                f"runs.{name}.transfer: {run.transfer} needs the teacher's width and heads, {teacher.width} and "
                f"{teacher.heads}; the student has {student.width} and {student.heads}"
            )
        if max(heads) % min(heads):
            raise ValueError(
                f"runs.{name}.architecture.heads: {student.heads} heads cannot take the maps of {teacher.heads}: "
                "one number must divide the other"
            )
        groups = run.heads_per_layer or (() if run.heads == "all" else (run.heads,))
        if groups and teacher.heads != student.heads:
            raise ValueError(
                f"runs.{name}.heads: cannot be chosen where teacher and student have other numbers"
            )
        if beyond := [head for group in groups for head in group if head >= student.heads]:
            raise ValueError(
                f"runs.{name}.heads: {beyond} lie beyond the {student.heads} heads, 0 to {student.heads - 1}"
            )

    def architecture(self, run: str) -> Architecture:
        """Of a run's student."""
        return self.runs[run].architecture or self.teachers[self.runs[run].teacher].architecture

    @property
    def tutors(self) -> Study:
        """The study whose runs are the fine-tuned teachers."""
        runs = {name: tutor.run for name, tutor in self.finetuned_teachers.items()}
        return self.model_copy(update={"runs": runs})

    @property
    def grid(self) -> list[tuple[str, int]]:
        """Every (run, seed), in order of params.yaml: what tables iterate over, never a folder."""
        return [(run, seed) for run in self.runs for seed in self.seeds]

    def layers(self, run: str) -> tuple[int, ...]:
        """The layers that a run transfers, from the input; none for a run without transfer.

        `all` is every layer that the student has.
        """
        chosen = self.runs[run].layers
        if chosen == "all":
            return tuple(range(self.architecture(run).depth))
        return tuple(sorted(chosen or ()))

    def heads(self, run: str) -> tuple[tuple[int, ...], ...]:
        """For each of the run's layers, the heads that are transferred."""
        chosen, layers = self.runs[run], self.layers(run)
        if chosen.heads_per_layer is not None:
            return tuple(tuple(sorted(heads)) for heads in chosen.heads_per_layer)
        every = range(self.architecture(run).heads) if chosen.heads == "all" else sorted(chosen.heads)
        return (tuple(every),) * len(layers)


def _known(key: str, name: str, names: dict[str, Any]) -> None:
    if name not in names:
        raise ValueError(f"{key}: {name!r} is not defined; {_nearest(name, names)}")


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(map(str, names))}"


def load(path: Path | str) -> Study:
    """Reads and checks a params.yaml, or the file of an experiment.

    Raises:
        StudyError: names file, key, value and remedy of everything that is wrong with it.
    """
    path = Path(path)
    values = params_yaml.read(path)
    extended, own_data = EXTENDS in values, "data" in values
    if extended:
        values = _extended(path, values)
    study = _checked(path, values)
    study._own_data = extended and own_data
    if "/" in study.name and not extended:
        raise StudyError(
            f"name: {study.name!r} is an experiment's, which has the key {EXTENDS}",
            where=str(path),
            remedy=f"name the study that it extends under {EXTENDS}, or give a name without a slash",
        )
    return study


def experiment_file(path: Path, name: str) -> Path:
    """Where the experiment of that name stands, of the study at `path`."""
    return path.with_suffix("") / f"{name}.yaml"


def experiments(path: Path | str) -> dict[str, Study]:
    """The experiments that a study names, checked: <study's file without .yaml>/<experiment>.yaml.

    Raises:
        StudyError: as `load`; or two of them, or one and the study, have a run of the same name.
    """
    path = Path(path)
    study, found = load(path), dict[str, Study]()
    owners = dict.fromkeys(study.runs, path)
    for name in study.experiments:
        file = experiment_file(path, name)
        found[name] = load(file)
        if found[name].name != f"{study.name}/{name}":
            raise StudyError(
                f"name: {found[name].name!r} is not {study.name}/{name}, as {path} calls it",
                where=str(file),
                remedy="correct the name, or rename the file",
            )
        if found[name].own_data and name in study.teachers:
            raise StudyError(
                f"name: {path} has a teacher of this name, whose records would lie where this experiment's do",
                where=str(file),
                remedy="choose another name for the experiment",
            )
        for run in found[name].runs:
            if run in owners:
                raise StudyError(
                    f"runs.{run}: {owners[run]} has a run of this name",
                    where=str(file),
                    remedy="a run has one name in the whole study: choose another",
                )
            owners[run] = file
    return found


EXTENDS = "extends"  # key of an experiment's file: path of the study's, from there
# What an experiment says for itself, beside which image sets it predicts; `data` too, key by key.
_OWN = ("name", "seeds", "runs", "ensembles")


def _extended(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """An experiment's values over those of the study that it extends."""
    base_path = path.parent / str(values.pop(EXTENDS))
    base = params_yaml.read(base_path)
    if EXTENDS in base:
        raise StudyError(
            f"{EXTENDS}: {base_path} extends another study itself",
            where=str(path),
            remedy="name the study that is extended",
        )
    _checked(base_path, base)
    own = values.get("evaluation", {})
    shared = sorted(values.keys() & Study.model_fields.keys() - {*_OWN, "data", "evaluation"})
    shared += sorted(f"evaluation.{key}" for key in own if key != "sets") if isinstance(own, dict) else []
    if shared:
        raise StudyError(
            f"{', '.join(shared)}: is that of {base_path} for all of its experiments",
            where=str(path),
            remedy=f"remove it here; an experiment has {', '.join(_OWN)}, data and evaluation.sets",
        )
    if not str(values.get("name")).startswith(f"{base['name']}/"):
        raise StudyError(
            f"name: {values.get('name')!r} is no experiment of {base['name']}",
            where=str(path),
            remedy=f"call it {base['name']}/{path.stem}",
        )
    kept = {key: value for key, value in base.items() if key not in (*_OWN, "experiments")}
    judged = {key: value for key, value in base["evaluation"].items() if key != "sets"}
    merged = {**kept, **values, "experiments": (), "report": None}
    merged["evaluation"] = {**judged, **own} if isinstance(own, dict) else own
    if isinstance(data := values.get("data"), dict):
        merged["data"] = {**base["data"], **data}
        _same_images(path, merged, base_path, base)
    return merged


def _same_images(path: Path, values: dict[str, Any], base_path: Path, base: dict[str, Any]) -> None:
    """An experiment with data of its own takes the study's teachers, and none of its other images."""
    for key in ("image_size", "channels"):
        if values["data"][key] != base["data"][key]:
            raise StudyError(
                f"data.{key}: {values['data'][key]!r} is not the {base['data'][key]} that the teachers of {base_path} "
                "see",
                where=str(path),
                remedy="remove it here, or make this a study of its own, with teachers of its own",
            )
    sets = values["evaluation"].get("sets", ()) if isinstance(values["evaluation"], dict) else ()
    if others := [which for which in ("shifts", "digits") if which in sets]:
        raise StudyError(
            f"evaluation.sets: {', '.join(others)} are made of the images of {base_path}",
            where=str(path),
            remedy="name validation and test alone here, or remove data",
        )


def _checked(path: Path, values: dict[str, Any]) -> Study:
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise StudyError(
            "\n  ".join(lines), where=str(path), remedy="correct the keys named above"
        ) from error


def _explain(problem: Any) -> str:
    location = _location(problem["loc"])
    key = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(str(location[-1]), _fields_beside(problem['loc']))}"
    if problem["type"] == "missing":
        return f"{key}: is missing; it has no default"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.kind: is missing; it has no default"
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind: {problem['ctx']['tag']!r} is refused: choose {problem['ctx']['expected_tags']}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}.{message}" if key else message
    message = _MESSAGES.get(problem["type"], message)
    return f"{key}: {_shown(problem['input'])} is refused: {message}"


# Where pydantic speaks of Python's types, the words of a params.yaml.
_MESSAGES = {
    "tuple_type": "Input should be a list",
    "dict_type": "Input should be a section with keys",
    "model_type": "Input should be a section with keys",
    "model_attributes_type": "Input should be a section with keys",
    "invalid_key": "A key should be a word",
}


def _location(location: tuple[Any, ...]) -> list[Any]:
    """The way to a value in the user's file: without the members of unions that pydantic tried."""
    match location:
        case ("teachers", name, _, *rest):  # the kind
            return ["teachers", name, *rest]
        case ("runs", name, "layers" | "heads" as key, _, *rest):  # `all`, or a list
            return ["runs", name, key, *rest]
        case ("runs" | "ensembles" | "finetuned_teachers" as section, name, "[key]"):
            return [section, name]
    return list(location)


def _fields_beside(location: tuple[Any, ...]) -> list[str]:
    """The valid keys at the place of an unknown one."""
    sections: dict[Any, type[BaseModel]] = {
        "data": Data,
        "views": Views,
        "attention": AttentionCache,
        "training": Training,
        "evaluation": Evaluation,
        "report": Report,
        "runs": Run,
        "attention_loss": AttentionLoss,
        "feature_loss": FeatureLoss,
        "logit_loss": LogitLoss,
        "finetuned_teachers": FinetunedTeacher,
        "run": Run,  # of a fine-tuned teacher
        "ensembles": Ensemble,
        "architecture": Architecture,
        "decoder": Decoder,
        "mae": MaskedAutoencoder,
        "simmim": MaskedImageModelling,
        "moco_v3": MomentumContrast,
        "dino": SelfDistillation,
        "supervised": GroupClassification,
        "untrained": Untrained,
        "file": FromFile,
    }
    named = location[0] in ("teachers", "finetuned_teachers", "runs", "ensembles")
    # The second part is then a name that the user chose, which may be that of a section.
    path = [location[0], *location[2:-1]] if named else location[:-1]
    return list((sections[path[-1]] if path else Study).model_fields)


def _shown(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    try:
        shown = repr(list(value) if isinstance(value, tuple) else value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        return "this value"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
