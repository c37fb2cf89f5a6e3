"""params.yaml as frozen, validated dataclasses: the only reader of that file, the only defaults.

`load` checks the whole file, relations between its keys included, before any stage works. Only
`runs` have defaults, and the stage `resolve` writes each run's resolved values to a file that
training depends on: a changed default reruns what it changes. Elsewhere a key may be left out where
that says what it means: no components, the task's own images to pre-train on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from attention_transfer import params_yaml
from attention_transfer.config_errors import explain, nearest
from attention_transfer.config_runs import (
    COPIES_ATTENTION,
    AttentionLoss,
    FeatureLoss,
    FinetunedTeacher,
    LogitLoss,
    Run,
)
from attention_transfer.config_teachers import (
    HUB,
    PRETRAINING_IMAGES,
    Architecture,
    Component,
    Decoder,
    FromFile,
    FromTimm,
    GroupClassification,
    MaskedAutoencoder,
    MaskedImageModelling,
    MomentumContrast,
    Pretrained,
    Release,
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
)
from attention_transfer.errors import StudyError

__all__ = [
    "COPIES_ATTENTION",
    "HUB",
    "PRETRAINING_IMAGES",
    "Architecture",
    "AttentionLoss",
    "Component",
    "FromFile",
    "FromTimm",
    "GroupClassification",
    "MaskedAutoencoder",
    "MaskedImageModelling",
    "MomentumContrast",
    "Pretrained",
    "PublishedSet",
    "Release",
    "Run",
    "SelfDistillation",
    "Study",
    "Untrained",
    "experiments",
    "load",
]

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
    """`fashion-mnist`, `digits`; `files`: class folders, or tars of them, too many to hold in memory, decoded whenever
    an image is shown; or any name that `timm.data.create_dataset` opens as a map-style data set, decoded once."""
    folder: str
    """Where the files lie; a download goes there too. Digits, those of scikit-learn, come with it."""
    train_split: str
    """Split from which labelled, validation and pre-training images are drawn."""
    test_split: str
    """Split that nothing but the evaluation reads."""
    resize: Positive
    """Shorter side to which images are resized before the centre is cut out, in pixels; those of `files` are cropped at
    their own resolution in training."""
    image_size: Positive
    """Side of the square that is shown, in pixels."""
    channels: Literal[1, 3]
    """Grey or RGB; images of the other kind are converted."""
    labelled: Positive
    """Labelled training images, drawn in the classes' proportions."""
    validation: Positive
    """Images on which choices are made; left out of pre-training."""
    seed: Seed
    """Draw of the splits, and of the training views."""

    @model_validator(mode="after")
    def _centre_is_inside(self) -> Self:
        if self.resize < self.image_size:
            raise ValueError(f"resize: {self.resize} is smaller than image_size, {self.image_size}")
        if self.source == "digits" and self.resize != self.image_size:
            raise ValueError("resize: must be image_size for digits, which are not cropped")
        return self

    @model_validator(mode="after")
    def _two_splits(self) -> Self:
        if self.train_split == self.test_split:
            raise ValueError(f"test_split: {self.test_split!r} is the training split too")
        if self.source in BUILT_IN and (self.train_split, self.test_split) != ("train", "test"):
            raise ValueError(f"train_split, test_split: those of {self.source} are called train and test")
        return self


# The parts of a policy that timm reads as numbers.
RAND_AUGMENT = r"rand(-(m[0-9]+|n[0-9]+|mstd[0-9]+(\.[0-9]+)?|mmax[0-9]+|inc[01]|p[01](\.[0-9]+)?))*"


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
    """Probability that a rectangle is replaced."""
    erase_with: Literal["mean", "noise"] = "mean"
    """By what: the mean colour, or normal noise in every value (timm's mode `pixel`)."""
    rand_augment: str | None = None
    """RandAugment between crop and erasing, as timm writes it: `rand-m9-mstd0.5-inc1`; None: not at all."""
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
        if self.rand_augment is not None and not re.fullmatch(RAND_AUGMENT, self.rand_augment):
            raise ValueError(
                f"rand_augment: {self.rand_augment!r} is no policy of timm's, such as rand-m9-mstd0.5-inc1"
            )
        return self


class AttentionCache(Section):
    """How students get at the teacher's attention."""

    source: Literal["cache", "online", "auto"]
    """`cache`: read from disk; `online`: the frozen teacher runs in every step; `auto`: `plan.choose`."""
    content: Literal["queries_and_keys", "maps"]
    """What is stored of it; maps are larger where tokens are many, and serve transfer: map alone."""
    dtype: Literal["float16", "float32", "int8"]
    """Number format of what is stored, in the cache and online alike; int8 with a scale per vector."""
    budget_gb: Annotated[float, Field(gt=0)]
    """The cache of training views may take so many GB (10^9 bytes)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.content == "maps" and self.dtype == "int8":
            raise ValueError("dtype: maps are stored as floats: choose float16 or float32")
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


class PublishedSet(Section):
    """Images that others have published as a shift of the task; see data/published.py.

    Where they are missing, the study goes on without them, and says so.
    """

    layout: Literal["class_names", "class_numbers", "mapped_names", "corruptions"]
    """What its folders are called: as the training images' (ImageNet-A, -R, -Sketch), by number (ImageNet-V2), in
    another way that `mapping` explains (ObjectNet), or `corruptions` of several severities (ImageNet-C)."""
    folder: str
    """Where it lies: a folder, or a tar."""
    mapping: str | None = None
    """Of `mapped_names`: a JSON file, from the names of its folders to lists of the training images' classes."""
    corruptions: tuple[str, ...] = ()
    """Of `corruptions`: their folders."""
    images: Positive | None = None
    """So many of each set, as many of each class as possible; None: all."""

    @model_validator(mode="after")
    def _has_what_the_layout_needs(self) -> Self:
        for key, layout in (("mapping", "mapped_names"), ("corruptions", "corruptions")):
            if bool(getattr(self, key)) != (self.layout == layout):
                raise ValueError(f"{key}: needed by layout {layout}, and by no other")
        no_value_twice("corruptions", self.corruptions)
        return self


class Evaluation(Section):
    """What the predictions are made on and how they are judged."""

    sets: tuple[Literal["validation", "test", "shifts", "digits", "published"], ...]
    """Image sets to predict on; a study that chooses hyper-parameters names `validation` alone."""
    shifts: tuple[Shift, ...]
    """Corruptions of test images, after Hendrycks and Dietterich (2019); see data/shifts.py."""
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...]
    """How strong they are, each of them."""
    shift_images: Positive
    """Test images, the same ones for each shift, drawn stratified."""
    published: dict[Name, PublishedSet]
    """Image sets that others have published as shifts of the task; {} for none."""
    calibration_bins: Positive
    """Equally wide bins of the expected calibration error."""
    confidence: Fraction
    """Level of all intervals."""
    bootstrap: Positive
    """Resamples of the bootstrap over seeds and examples."""

    @model_validator(mode="after")
    def _published_sets_are_named(self) -> Self:
        if ("published" in self.sets) != bool(self.published):
            raise ValueError("published: needed where sets names it, and only there")
        return self


class Ensemble(Section):
    """Average of two runs' predicted probabilities."""

    members: tuple[Name, Name]
    """Two runs of the same seed; a run with itself is paired with its next seed."""


class Report(Section):
    """Which runs play which part in the tables and claims."""

    scratch: Name
    """The run without a teacher: nothing of the gap."""
    finetune: Name
    """The run that starts from the teacher's weights: all of the gap."""
    copied: Name
    """Attention Copy."""
    distilled: Name
    """Attention Distill."""
    attention_images: Positive
    """Images whose attention maps are drawn."""
    equivalence_margin: Fraction
    """Accuracies closer than this count as equal."""


class Study(Section):
    """A whole params.yaml, or an experiment with what it takes from the study that it extends."""

    name: StudyName
    """Outputs lie below it: runs/<name>, metrics/<name>, reports/<name>."""
    experiments: tuple[Name, ...]
    """Further runs on this study's data and teachers: each in a file of its own, see `experiments`; [] for none."""
    seeds: tuple[Seed, ...]
    """Of the students: every run is trained once with each."""
    data: Data
    """Which images."""
    views: Views
    """How training images are augmented."""
    attention: AttentionCache
    """Where students get the teacher's attention."""
    training: Training
    """What all runs share."""
    teachers: dict[Name, Teacher]
    """Whose attention, features or weights the runs use."""
    finetuned_teachers: dict[Name, FinetunedTeacher]
    """For the distillation of logits; {} for none."""
    runs: dict[Name, Run]
    """The ways to train a student that are compared."""
    evaluation: Evaluation
    """On which images, and how they are judged."""
    ensembles: dict[Name, Ensemble]
    """Pairs of runs whose predictions are averaged."""
    report: Report | None
    """None: a study without the main comparison, such as a search for hyper-parameters."""
    _own_sections: tuple[str, ...] = PrivateAttr(default=())

    @property
    def own_data(self) -> bool:
        """Whether it is an experiment with other images, or another draw of them, than the study that it extends."""
        return "data" in self._own_sections

    @property
    def own_sections(self) -> tuple[str, ...]:
        """Of an experiment with data of its own: `data`, and which of `views` and `attention` it changes."""
        return self._own_sections

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

    def with_used_teachers(self) -> Self:
        """The study without the teachers that no run of its own takes anything from."""
        used = {name: self.teachers[name] for name in self.transferred_from}
        return self.model_copy(update={"teachers": used})

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
        if student.registers not in (0, teacher.registers):
            raise ValueError(
                f"runs.{name}.architecture.components: the student's registers have no counterparts in the teacher"
            )
        if student.class_token and not teacher.class_token:
            raise ValueError(
                f"runs.{name}.architecture.class_token: the teacher has none; give the student class_token: false"
            )
        if run.method == "distill_features":
            if teacher.registers != student.registers:
                raise ValueError(
                    f"runs.{name}.architecture.components: features of a teacher with registers need a student "
                    "with registers"
                )
            if teacher.class_token != student.class_token:
                raise ValueError(
                    f"runs.{name}.architecture.class_token: features of a teacher with one need a student with one"
                )
            if teacher.width != student.width:
                raise ValueError(
                    f"runs.{name}.architecture.width: {student.width} is not the teacher's, {teacher.width}, "
                    "whose features are compared one by one"
                )
            return
        if run.shares_stochastic_depth:
            self._has_masks_to_share(name)
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

    def _has_masks_to_share(self, name: str) -> None:
        key = f"runs.{name}.shares_stochastic_depth"
        if self.attention.source != "online":
            raise ValueError(
                f"{key}: attention from a cache knows no step's masks; set attention.source: online, or remove this key"
            )
        teacher, student = self.teachers[self.runs[name].teacher].architecture, self.architecture(name)
        if teacher.depth != student.depth:
            raise ValueError(
                f"{key}: the student has {student.depth} layers, the teacher {teacher.depth}, which drop at other "
                "rates; remove this key"
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
        raise ValueError(f"{key}: {name!r} is not defined; {nearest(name, names)}")


def load(path: Path | str) -> Study:
    """Reads and checks a params.yaml, or the file of an experiment.

    Raises:
        StudyError: names file, key, value and remedy of everything that is wrong with it.
    """
    path = Path(path)
    values = params_yaml.read(path)
    extended = EXTENDS in values
    own = tuple(key for key in _WITH_DATA if key in values)
    if extended:
        values = _extended(path, values)
    study = _checked(path, values)
    study._own_sections = own if extended else ()
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
_WITH_DATA = ("data", "views", "attention")  # one with data of its own writes caches of its own


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
    allowed = {*_OWN, "evaluation", *(_WITH_DATA if "data" in values else ())}
    shared = sorted(values.keys() & Study.model_fields.keys() - allowed)
    shared += sorted(f"evaluation.{key}" for key in own if key != "sets") if isinstance(own, dict) else []
    if shared:
        raise StudyError(
            f"{', '.join(shared)}: is that of {base_path} for all of its experiments",
            where=str(path),
            remedy=f"remove it here; an experiment has {', '.join(_OWN)}, evaluation.sets and data, with data also "
            "views and attention",
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
    for section in _WITH_DATA:
        if isinstance(values.get(section), dict):
            merged[section] = {**base[section], **values[section]}
    if isinstance(values.get("data"), dict):
        _same_images(path, merged, base_path, base)
    return merged


def _same_images(path: Path, values: dict[str, Any], base_path: Path, base: dict[str, Any]) -> None:
    """An experiment with data of its own takes the study's teachers, and none of its other images."""
    for key in ("resize", "image_size", "channels"):
        if values["data"][key] != base["data"][key]:
            raise StudyError(
                f"data.{key}: {values['data'][key]!r} is not the {base['data'][key]} that the teachers of {base_path} "
                "see",
                where=str(path),
                remedy="remove it here, or make this a study of its own, with teachers of its own",
            )
    sets = values["evaluation"].get("sets", ()) if isinstance(values["evaluation"], dict) else ()
    if others := [which for which in ("shifts", "digits", "published") if which in sets]:
        raise StudyError(
            f"evaluation.sets: {', '.join(others)} are made of the images of {base_path}",
            where=str(path),
            remedy="name validation and test alone here, or remove data",
        )


def _checked(path: Path, values: dict[str, Any]) -> Study:
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        lines = [explain(problem, _SECTIONS) for problem in error.errors()]
        raise StudyError(
            "\n  ".join(lines), where=str(path), remedy="correct the keys named above"
        ) from error


_SECTIONS: dict[Any, type[BaseModel]] = {
    None: Study,
    "data": Data,
    "views": Views,
    "attention": AttentionCache,
    "training": Training,
    "evaluation": Evaluation,
    "published": PublishedSet,
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
    **{get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(Teacher)[0])},
}
