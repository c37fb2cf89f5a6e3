"""params.yaml as frozen, validated dataclasses: the only reader of that file, the only defaults.

`load` checks the whole file, relations between its keys included, before any stage works. Only
`runs` have defaults, and the stage `resolve` writes each run's resolved values to a file that
training depends on: a changed default reruns what it changes.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from attention_transfer.errors import StudyError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
"""A name becomes a folder, a stage and a label: lower-case letters, digits and underscores."""
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=10)]

Method = Literal["scratch", "finetune", "linear_probe", "copy", "distill"]
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


class Section(BaseModel):
    """Frozen; a key that is not declared here is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(Section):
    """Which images, and how they are split."""

    source: str
    """`fashion-mnist`, or any name that `timm.data.create_dataset` opens as a map-style data set."""
    folder: str
    """Where the files lie; a download goes there too."""
    train_split: str
    """Split from which labelled, validation and pre-training images are drawn."""
    test_split: str
    """Split that nothing but the evaluation reads."""
    image_size: Positive
    """Side of the square images, in pixels; other sizes are resized and centre-cropped."""
    channels: Literal[1, 3]
    labelled: Positive
    """Labelled training images, the same number of each class."""
    validation: Positive
    """Images on which choices are made; left out of pre-training."""
    seed: Seed
    """Draw of the splits, and of the training views."""


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

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}: the smallest value {low} is larger than the largest, {high}")
        return self


class AttentionCache(Section):
    """How students get at the teacher's attention."""

    source: Literal["cache", "online"]
    """`cache`: read from disk; `online`: the frozen teacher runs in every step."""
    dtype: Literal["float16", "float32"]
    """Number format of queries and keys, in the cache and online alike."""
    budget_gb: Annotated[float, Field(gt=0)]
    """The cache of training views may take so many GB (10^9 bytes)."""


class Architecture(Section):
    """A plain Vision Transformer; image size and channels are the data's."""

    patch_size: Positive
    width: Positive
    depth: Positive
    heads: Positive
    mlp_ratio: Rate

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} heads do not divide the width {self.width}")
        return self


class Decoder(Section):
    """The masked autoencoder's light decoder."""

    width: Positive
    depth: Positive
    heads: Positive

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} heads do not divide the width {self.width}")
        return self


class MaskedAutoencoder(Section):
    """A teacher pre-trained here, without labels (He et al., 2022)."""

    kind: Literal["mae"]
    architecture: Architecture
    decoder: Decoder
    mask_ratio: Fraction
    epochs: Positive
    warmup_epochs: Annotated[float, Field(ge=0)]
    batch_size: Positive
    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    crop_scale: tuple[Share, Share]
    seed: Seed

    # The rest of the optimiser's recipe is that of He et al. (2022), appendix A.1.
    min_learning_rate: ClassVar[float] = 0.0
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    layer_decay: ClassVar[float] = 1.0
    ema: ClassVar[float | None] = None


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


Teacher = Annotated[MaskedAutoencoder | Untrained | FromFile, Field(discriminator="kind")]


class AttentionLoss(Section):
    """Cross-entropy between the teacher's and the student's attention maps."""

    weight: Annotated[float, Field(gt=0)]
    reduction: Literal["sum", "mean"] = "sum"
    """Over layers: `sum` as in the official code, or `mean`."""


class Run(Section):
    """One way to train a student."""

    method: Method
    teacher: Name
    """Whose architecture the student has, and whose weights or attention the method uses."""
    layers: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """copy, distill: which layers are transferred, counted from 0 at the input."""
    attention_loss: AttentionLoss | None = None
    """distill only."""
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
        transfers = self.method in ("copy", "distill")
        if transfers and not self.layers:
            raise ValueError(f"layers: method {self.method} needs the layers to transfer: all, or a list")
        if not transfers and self.layers is not None:
            raise ValueError(f"layers: method {self.method} transfers no attention; remove this key")
        if (self.method == "distill") != (self.attention_loss is not None):
            raise ValueError("attention_loss: needed by method distill, and by no other")
        if isinstance(self.layers, tuple) and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: {list(self.layers)} names a layer twice")
        if self.method == "linear_probe" and (self.layer_decay != 1.0 or self.drop_path != 0.0):
            raise ValueError("layer_decay, drop_path: linear_probe trains the head alone; remove these keys")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs} is not below epochs, {self.epochs}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate: larger than learning_rate")
        return self


class Training(Section):
    """What all runs share."""

    precision: Literal["float32", "bfloat16"]
    """Matrix products and attention run in this format; weights and losses stay in float32."""
    clip_norm: Annotated[float, Field(gt=0)] | None
    """Gradients are scaled down to this norm."""
    validate_every: Positive
    """Epochs from one validation to the next; the last epoch is always validated."""


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
    """A whole params.yaml."""

    name: Name
    seeds: tuple[Seed, ...]
    data: Data
    views: Views
    attention: AttentionCache
    training: Training
    teachers: dict[Name, Teacher]
    runs: dict[Name, Run]
    evaluation: Evaluation
    ensembles: dict[Name, Ensemble]
    report: Report | None
    """None: a study without the main comparison, such as a search for hyper-parameters."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key in ("seeds", "teachers", "runs"):
            if not getattr(self, key):
                raise ValueError(f"{key}: is empty; at least one is needed")
        for key, values in (
            ("seeds", self.seeds),
            ("evaluation.sets", self.evaluation.sets),
            ("evaluation.shifts", self.evaluation.shifts),
            ("evaluation.severities", self.evaluation.severities),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{key}: {list(values)} names a value twice")
        for name, teacher in self.teachers.items():
            if self.data.image_size % teacher.architecture.patch_size:
                raise ValueError(
                    f"teachers.{name}.architecture.patch_size: {teacher.architecture.patch_size} "
                    f"does not divide data.image_size, {self.data.image_size}"
                )
        for name, run in self.runs.items():
            _known(f"runs.{name}.teacher", run.teacher, self.teachers)
            depth = self.teachers[run.teacher].architecture.depth
            if isinstance(run.layers, tuple) and (
                beyond := [layer for layer in run.layers if layer >= depth]
            ):
                raise ValueError(
                    f"runs.{name}.layers: {beyond} lie beyond the teacher's {depth} layers, 0 to {depth - 1}"
                )
            if run.batch_size > self.data.labelled:
                raise ValueError(
                    f"runs.{name}.batch_size: {run.batch_size} is more than the "
                    f"{self.data.labelled} labelled images"
                )
        for name, ensemble in self.ensembles.items():
            for member in ensemble.members:
                _known(f"ensembles.{name}.members", member, self.runs)
            if ensemble.members[0] == ensemble.members[1] and len(self.seeds) < 2:
                raise ValueError(f"ensembles.{name}: two members of one run need two seeds")
        if self.report is not None:
            for part in ("scratch", "finetune", "copied", "distilled"):
                _known(f"report.{part}", getattr(self.report, part), self.runs)
        if "shifts" in self.evaluation.sets and not (self.evaluation.shifts and self.evaluation.severities):
            raise ValueError("evaluation.shifts: is empty although evaluation.sets names shifts")
        return self

    @property
    def grid(self) -> list[tuple[str, int]]:
        """Every (run, seed), in order of params.yaml: what tables iterate over, never a folder."""
        return [(run, seed) for run in self.runs for seed in self.seeds]

    def layers(self, run: str) -> tuple[int, ...]:
        """The layers that a run transfers, from the input; none for a run without transfer."""
        chosen = self.runs[run].layers
        if chosen == "all":
            return tuple(range(self.teachers[self.runs[run].teacher].architecture.depth))
        return tuple(sorted(chosen or ()))


def _known(key: str, name: str, names: dict[str, Any]) -> None:
    if name not in names:
        raise ValueError(f"{key}: {name!r} is not defined; {_nearest(name, names)}")


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(map(str, names))}"


class _Loader(yaml.SafeLoader):
    """YAML as DVC reads it: 1e-3 is a number, yes and no are strings, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"
    ),
    list("-+.0123456789"),
)


def load(path: Path | str) -> Study:
    """Reads and checks a params.yaml.

    Raises:
        StudyError: names file, key, value and remedy of everything that is wrong with it.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise StudyError(
            "does not exist", where=str(path), remedy="give the path of a params.yaml"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StudyError(
            f"is not valid YAML: {' '.join(str(error).split())}", where=str(path), remedy="correct that line"
        ) from error
    if not isinstance(values, dict):
        raise StudyError("holds no keys", where=str(path), remedy="start from a copy of params.yaml")
    try:
        return Study.model_validate(_tuples(values))
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise StudyError(
            "\n  ".join(lines), where=str(path), remedy="correct the keys named above"
        ) from error


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(problem: Any) -> str:
    # Union members (mae, untrained ..) stand in pydantic's location but not in the user's file.
    kinds = {"mae", "untrained", "file"}
    location = list(problem["loc"])
    if location[:1] == ["teachers"]:
        location = location[:2] + [part for part in location[2:] if part not in kinds]
    location = [part for part in location if part != "[key]" and not _is_union_tag(part)]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(str(location[-1]), _fields_beside(problem['loc']))}"
    if problem["type"] == "missing":
        return f"{key}: is missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}.{message}" if key else message
    value = problem.get("input")
    shown = "NaN" if isinstance(value, float) and math.isnan(value) else repr(value)
    return f"{key}: {shown[:80]} is refused: {message}"


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part.startswith(("literal[", "tuple[", "constrained-", "function-"))
        or part in {"int", "float", "str"}
    )


def _fields_beside(location: tuple[Any, ...]) -> list[str]:
    """The valid keys at the place of an unknown one."""
    sections: dict[Any, type[BaseModel]] = {
        "data": Data,
        "views": Views,
        "attention": AttentionCache,
        "training": Training,
        "evaluation": Evaluation,
        "report": Report,
        "attention_loss": AttentionLoss,
        "architecture": Architecture,
        "decoder": Decoder,
        "mae": MaskedAutoencoder,
        "untrained": Untrained,
        "file": FromFile,
    }
    for part in reversed(location[:-1]):
        if part in sections:
            return list(sections[part].model_fields)
    parents = {"runs": Run, "ensembles": Ensemble}
    section = parents.get(location[0], Study) if len(location) > 1 else Study
    return list(section.model_fields)
