"""params.yaml: what is read, what is refused, and that every refusal is one message with its remedy."""

from __future__ import annotations

import copy
import datetime
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from attention_transfer import config, params_yaml
from attention_transfer.errors import StudyError

ROOT = Path(__file__).parents[1]
STUDIES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
# Keys that a study need not have: no components, the task's images, no RandAugment, the mean colour.
LEFT_OUT = {
    "components",
    "images",
    "class_token",
    "register_tokens",
    "timm",
    "rand_augment",
    "erase_with",
}
NAMED = (
    "teachers",
    "finetuned_teachers",
    "runs",
    "ensembles",
)  # sections whose keys are names that the user chose


def core() -> dict[str, Any]:
    """params.yaml as DVC reads it, which is not by the code under test."""
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    assert isinstance(values, dict)
    # One of each section that may be empty, so that its keys are tested too.
    values["finetuned_teachers"] = {"tutor": {"seed": 1, "run": dict(values["runs"]["finetune"])}}
    return values


CORE = core()


def place(values: dict[str, Any], key: str) -> tuple[Any, str]:
    """The section that holds a dotted key, and its last part."""
    *path, last = key.split(".")
    for part in path:
        values = values[part]
    return values, last


def changed(**changes: Any) -> dict[str, Any]:
    """params.yaml with other values; `__` in a key stands for a dot."""
    values = copy.deepcopy(CORE)
    for key, value in changes.items():
        section, last = place(values, key.replace("__", "."))
        section[last] = value
    return values


def load(folder: Path, values: Any) -> config.Study:
    """Loads values written as JSON, of which YAML 1.2 is a superset."""
    path = folder / "params.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return config.load(path)


def refusal(folder: Path, values: Any) -> str:
    """The message with which values, or a text, are refused; checks what all messages have in common."""
    path = folder / "params.yaml"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        config.load(path)
    return well_formed(caught.value, path)


def well_formed(error: StudyError, path: Path) -> str:
    message = str(error)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert message.count("What to do: ") == 1
    assert error.remedy
    return message.removeprefix(f"{path}: ")


def sections(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every section whose keys config.py declares."""
    if path not in ((section,) for section in NAMED) and path != ("evaluation", "published"):
        yield path
    for key, value in values.items():
        if isinstance(value, dict):
            yield from sections(value, (*path, key))


# What is read


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_loads(path: Path) -> None:
    study = config.load(path)
    assert study.grid == [(run, seed) for run in study.runs for seed in study.seeds]


def test_every_value_arrives(tmp_path: Path) -> None:
    """Each value of the file is found under its dotted name, and defaults only in runs."""

    def compare(found: Any, written: Any, key: str) -> None:
        if isinstance(written, dict):
            for part, value in written.items():
                compare(
                    found[part] if isinstance(found, dict) else getattr(found, part), value, f"{key}.{part}"
                )
            if not isinstance(found, dict | config.Run | config.AttentionLoss):
                assert set(type(found).model_fields) - LEFT_OUT == set(written), key
        else:
            assert (list(found) if isinstance(found, tuple) else found) == written, key

    compare(load(tmp_path, CORE), CORE, "")


def test_a_study_is_frozen() -> None:
    study = config.load(ROOT / "params.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        study.data.labelled = 3


def test_layers_of_a_run(tmp_path: Path) -> None:
    assert config.load(ROOT / "params.yaml").layers("copy") == (0, 1, 2, 3, 4, 5)
    study = load(tmp_path, changed(runs__copy__layers=[4, 0, 2]))
    assert study.layers("copy") == (0, 2, 4)
    assert study.layers("scratch") == ()


def test_numbers_as_in_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("learning_rate: 0.002", "learning_rate: 2e-3"), encoding="utf-8")
    teacher = config.load(path).teachers["mae"]
    assert isinstance(teacher, config.MaskedAutoencoder)
    assert teacher.learning_rate == 0.002


# Keys


def section_at(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for part in path:
        values = values[part]
    return values


@pytest.mark.parametrize("path", list(sections(CORE)), ids=lambda path: ".".join(path) or "top")
def test_unknown_keys_name_their_nearest_neighbours(path: tuple[str, ...], tmp_path: Path) -> None:
    values = changed()
    section = section_at(values, path)
    section |= {f"{key}x": value for key, value in section.items()}
    problems = refusal(tmp_path, values).split("\n  ")[:-1]
    declared = section_at(CORE, path)
    assert set(problems) == {
        f"{'.'.join([*path, f'{key}x'])}: unknown key; did you mean {key!r}?" for key in declared
    }


def test_keys_beside_come_from_the_section_not_from_a_name(tmp_path: Path) -> None:
    """Runs, teachers and ensembles may be called like a section, a kind, or a type of pydantic's."""
    values = changed()
    values["runs"] |= {"data": dict(values["runs"]["scratch"]), "int": dict(values["runs"]["copy"])}
    values["teachers"]["decoder"] = copy.deepcopy(values["teachers"]["mae"])
    values["ensembles"]["mae"] = {"members": ["data", "int"]}
    load(tmp_path, values)
    values["runs"]["data"]["warmup_epoch"] = 1
    values["runs"]["int"]["layers"] = [0, -1]
    values["teachers"]["decoder"]["mask_ration"] = 1
    values["teachers"]["decoder"]["file"] = 1
    values["ensembles"]["mae"]["member"] = 1
    message = refusal(tmp_path, values)
    assert "runs.data.warmup_epoch: unknown key; did you mean 'warmup_epochs'?" in message
    assert "runs.int.layers.1: -1 is refused" in message
    assert "teachers.decoder.mask_ration: unknown key; did you mean 'mask_ratio'?" in message
    assert "teachers.decoder.file: unknown key; known are " in message
    assert "ensembles.mae.member: unknown key; did you mean 'members'?" in message


@pytest.mark.parametrize(
    ("keys", "declared"), [(("kind", "architecture", "seed"), "untrained"), (("path", "sha256"), "file")]
)
def test_keys_of_other_teachers(keys: tuple[str, ...], declared: str, tmp_path: Path) -> None:
    architecture = CORE["teachers"]["mae"]["architecture"]
    teacher = {"kind": declared, "architecture": architecture}
    teacher |= {"seed": 0} if declared == "untrained" else {"path": "a.safetensors", "sha256": "0" * 64}
    values = changed()
    values["teachers"]["other"] = teacher
    assert load(tmp_path, values).teachers["other"].kind == declared
    for key in keys:
        values["teachers"]["other"] = {**teacher, f"{key}x": 1}
        assert f"teachers.other.{key}x: unknown key; did you mean {key!r}?" in refusal(tmp_path, values)


@pytest.mark.parametrize("path", list(sections(CORE)), ids=lambda path: ".".join(path) or "top")
def test_missing_keys_are_named(path: tuple[str, ...], tmp_path: Path) -> None:
    """Only runs have defaults."""
    optional = {"layers", "attention_loss", "layer_decay", "weight_decay", "label_smoothing", "warmup_epochs"}
    needed = section_at(CORE, path).keys() - (
        {*optional, "reduction"} if {"runs", "run"} & set(path) else {"kind"}
    )
    values = changed()
    for key in needed:
        del section_at(values, path)[key]
    problems = refusal(tmp_path, values).split("\n  ")[:-1]
    assert set(problems) == {f"{'.'.join([*path, key])}: is missing; it has no default" for key in needed}


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("runs.copy.layers", "runs.copy.layers: method copy needs the layers to transfer"),
        ("runs.distill.layers", "runs.distill.layers: method distill needs the layers"),
        ("runs.distill.attention_loss", "runs.distill.attention_loss: needed by method distill"),
        ("teachers.mae.kind", "teachers.mae.kind: is missing; it has no default"),
    ],
)
def test_keys_that_a_method_or_a_kind_needs(key: str, says: str, tmp_path: Path) -> None:
    values = changed()
    section, last = place(values, key)
    del section[last]
    assert refusal(tmp_path, values).startswith(says)


# Values

TEACHER = CORE["teachers"]["mae"]
RUN = CORE["runs"]["scratch"]
ARCHITECTURE = CORE["teachers"]["mae"]["architecture"]
REFUSED: list[tuple[str, Any, str]] = [
    # key, value, what the message says of it; the key as the message gives it comes before a `|`
    ("data.labelled", "500", "data.labelled: '500' is refused"),
    ("data.labelled", 500.0, "data.labelled: 500.0 is refused"),
    ("data.labelled", True, "data.labelled: True is refused"),
    ("data.labelled", 0, "data.labelled: 0 is refused"),
    ("data.labelled", None, "data.labelled: None is refused"),
    ("data.labelled", [5], "data.labelled: [5] is refused"),
    ("data.labelled", {"a": 5}, "data.labelled: {'a': 5} is refused"),
    ("data.channels", 2, "data.channels: 2 is refused"),
    ("data.seed", -1, "data.seed: -1 is refused"),
    ("data.seed", 2**31, "data.seed: 2147483648 is refused"),
    ("data.source", 3, "data.source: 3 is refused"),
    ("data.test_split", "train", "data.test_split: 'train' is the training split too"),
    ("data.train_split", "training", "data.train_split, test_split: those of fashion-mnist"),
    ("data", [1], "data: [1] is refused: Input should be a section with keys"),
    ("data", None, "data: None is refused: Input should be a section with keys"),
    ("runs", [1], "runs: [1] is refused: Input should be a section with keys"),
    ("runs.copy", "all", "runs.copy: 'all' is refused: Input should be a section with keys"),
    ("views.flip", "yes", "views.flip: 'yes' is refused"),
    ("views.flip", True, "views.flip: True is refused"),
    ("views.flip", 1.5, "views.flip: 1.5 is refused"),
    ("views.mixup", -0.1, "views.mixup: -0.1 is refused"),
    ("views.cutmix", 101, "views.cutmix: 101 is refused"),
    ("views.crop_scale", [0.9, 0.5], "views.crop_scale: the smallest value, 0.9, is larger than the largest"),
    ("views.crop_ratio", [2.0, 1.0], "views.crop_ratio: the smallest value, 2.0, is larger than"),
    ("views.crop_scale", [0.0, 1.0], "views.crop_scale.0: 0.0 is refused"),
    ("views.crop_scale", [0.5, 1.0, 1.0], "views.crop_scale"),
    ("views.crop_scale", 0.5, "views.crop_scale: 0.5 is refused: Input should be a list"),
    (
        "attention.source",
        "disk",
        "attention.source: 'disk' is refused: Input should be 'cache', 'online' or 'auto'",
    ),
    ("attention.content", "values", "attention.content: 'values' is refused"),
    ("attention.dtype", "float8", "attention.dtype: 'float8' is refused"),
    ("attention.budget_gb", 0, "attention.budget_gb: 0 is refused"),
    ("training.clip_norm", 0.0, "training.clip_norm: 0.0 is refused"),
    ("training.precision", 32, "training.precision: 32 is refused"),
    ("teachers", {}, "teachers: is empty; at least one is needed"),
    ("teachers.mae", {**TEACHER, "kind": "clip"}, "teachers.mae.kind: 'clip' is refused: choose 'mae', "),
    ("teachers.mae", {}, "teachers.mae.kind: is missing"),
    ("teachers.mae.mask_ratio", 1.0, "teachers.mae.mask_ratio: 1.0 is refused"),
    ("teachers.mae.warmup_epochs", 20, "teachers.mae.warmup_epochs: 20.0 is not below epochs, 20"),
    ("teachers.mae.crop_scale", [1.0, 0.5], "teachers.mae.crop_scale: the smallest value, 1.0, is larger"),
    ("teachers.mae.architecture.heads", 5, "teachers.mae.architecture.heads: 5 does not divide width, 96"),
    ("teachers.mae.decoder.heads", 5, "teachers.mae.decoder.heads: 5 does not divide width, 48"),
    (
        "teachers.mae.architecture.patch_size",
        8,
        "teachers.mae.architecture.patch_size: 8 does not divide data.image_size, 28",
    ),
    (
        "teachers.mae.architecture.patch_size",
        56,
        "teachers.mae.architecture.patch_size: 56 does not divide data.image_size, 28",
    ),
    ("runs", {}, "runs: is empty; at least one is needed"),
    ("runs.copy.method", "copied", "runs.copy.method: 'copied' is refused"),
    ("runs.scratch.teacher", "moe", "runs.scratch.teacher: 'moe' is not defined; did you mean 'mae'?"),
    ("runs.scratch.teacher", "dinov2", "runs.scratch.teacher: 'dinov2' is not defined; known are mae"),
    ("runs.copy.layers", [0, 6], "runs.copy.layers: [6] lie beyond the teacher's 6 layers, 0 to 5"),
    ("runs.copy.layers", [1, 1], "runs.copy.layers: [1, 1] names a layer twice"),
    ("runs.copy.layers", [], "runs.copy.layers: method copy needs the layers to transfer"),
    ("runs.copy.layers", "none", "runs.copy.layers: 'none' is refused: Input should be 'all'"),
    ("runs.copy.layers", [-1], "runs.copy.layers.0: -1 is refused"),
    ("runs.copy.transfer", "values", "runs.copy.transfer: 'values' is refused"),
    ("runs.scratch.transfer", "key", "runs.scratch.transfer: method scratch transfers no attention; remove"),
    ("runs.finetune.heads", [0], "runs.finetune.heads: method finetune transfers no attention; remove this"),
    ("runs.scratch.average", "heads", "runs.scratch.average: method scratch transfers no attention; remove"),
    ("runs.copy.heads", [], "runs.copy.heads: is empty; at least one is needed"),
    ("runs.copy.heads", [1, 1], "runs.copy.heads: [1, 1] names a head twice"),
    ("runs.copy.heads", [0, 4], "runs.copy.heads: [4] lie beyond the 4 heads, 0 to 3"),
    ("runs.copy.heads", ["a"], "runs.copy.heads.0: 'a' is refused"),
    (
        "runs.copy.heads_per_layer",
        [[0]],
        "runs.copy.heads_per_layer: 1 lists; layers must be a list of as many",
    ),
    ("runs.copy.heads_per_layer", [[]], "runs.copy.heads_per_layer: is empty"),
    ("runs.copy.average", "keys", "runs.copy.average: 'keys' is refused"),
    ("runs.scratch.initial", "moe", "runs.scratch.initial: 'moe' is not defined; did you mean 'mae'?"),
    (
        "runs.finetune.initial",
        "mae",
        "runs.finetune.initial: method finetune starts from its teacher; remove",
    ),
    ("runs.linear_probe.architecture", ARCHITECTURE, "runs.linear_probe.architecture: method linear_probe"),
    (
        "runs.scratch.architecture",
        {**ARCHITECTURE, "heads": 5},
        "runs.scratch.architecture.heads: 5 does not divide width, 96",
    ),
    (
        "runs.scratch.architecture",
        {**ARCHITECTURE, "patch_size": 8},
        "runs.scratch.architecture.patch_size: 8 does not divide data.image_size, 28",
    ),
    (
        "runs.copy.architecture",
        {**ARCHITECTURE, "patch_size": 4},
        "runs.copy.architecture.patch_size: 4 makes other tokens than the teacher's 7",
    ),
    (
        "runs.copy.architecture",
        {**ARCHITECTURE, "depth": 7},
        "runs.copy.layers: all are the student's 7, the teacher has 6",
    ),
    (
        "runs.copy.architecture",
        {**ARCHITECTURE, "heads": 3},
        "runs.copy.architecture.heads: 3 heads cannot take the maps of 4: one number must divide",
    ),
    (
        "runs.distill.attention_loss",
        {"weight": 1.0, "temperature": 0.0},
        "runs.distill.attention_loss.temperature: 0.0 is refused",
    ),
    (
        "runs.distill.feature_loss",
        {"weight": 1.0},
        "runs.distill.feature_loss: needed by method distill_feat",
    ),
    ("runs.distill.logit_loss", {"weight": 1.0, "teacher": "t"}, "runs.distill.logit_loss: needed by method"),
    ("runs.scratch.layers", "all", "runs.scratch.layers: method scratch transfers no attention; remove this"),
    ("runs.finetune.layers", [0], "runs.finetune.layers: method finetune transfers no attention"),
    (
        "runs.copy.attention_loss",
        {"weight": 1.0},
        "runs.copy.attention_loss: needed by method distill, and by",
    ),
    ("runs.distill.attention_loss", None, "runs.distill.attention_loss: needed by method distill"),
    ("runs.distill.attention_loss.weight", 0.0, "runs.distill.attention_loss.weight: 0.0 is refused"),
    (
        "runs.distill.attention_loss.reduction",
        "max",
        "runs.distill.attention_loss.reduction: 'max' is refused",
    ),
    ("runs.linear_probe.layer_decay", 0.5, "runs.linear_probe.layer_decay, drop_path: linear_probe trains"),
    ("runs.scratch.warmup_epochs", 80, "runs.scratch.warmup_epochs: 80.0 is not below epochs, 80"),
    ("runs.scratch.min_learning_rate", 0.1, "runs.scratch.min_learning_rate: larger than learning_rate"),
    (
        "runs.scratch.shares_stochastic_depth",
        True,
        "runs.scratch.shares_stochastic_depth: method scratch transfers no attention; remove this key",
    ),
    ("training.curve_images", 3001, "training.curve_images: 3001 is more than the 3000 validation images"),
    ("runs.scratch.batch_size", 501, "runs.scratch.batch_size: 501 is more than the 500 labelled images"),
    ("runs.scratch.learning_rate", "1e-3x", "runs.scratch.learning_rate: '1e-3x' is refused"),
    ("runs.scratch.ema", 1.0, "runs.scratch.ema: 1.0 is refused"),
    ("seeds", [], "seeds: is empty; at least one is needed"),
    ("seeds", [0, 1, 0], "seeds: [0, 1, 0] names a value twice"),
    ("seeds", 3, "seeds: 3 is refused: Input should be a list"),
    ("evaluation.severities", [6], "evaluation.severities.0: 6 is refused"),
    ("evaluation.severities", [1, 1], "evaluation.severities: [1, 1] names a value twice"),
    ("evaluation.shifts", ["rain"], "evaluation.shifts.0: 'rain' is refused"),
    ("evaluation.shifts", ["fog", "fog"], "evaluation.shifts: ['fog', 'fog'] names a value twice"),
    ("evaluation.shifts", [], "evaluation.shifts: is empty although evaluation.sets names shifts"),
    ("evaluation.sets", ["tset"], "evaluation.sets.0: 'tset' is refused"),
    (
        "ensembles.finetune_copy.members",
        ["finetune", "copi"],
        "ensembles.finetune_copy.members: 'copi' is not defined; did you mean 'copy'?",
    ),
    ("ensembles.finetune_copy.members", ["finetune"], "ensembles.finetune_copy.members"),
    ("report.copied", "copi", "report.copied: 'copi' is not defined; did you mean 'copy'?"),
    ("report.equivalence_margin", 0, "report.equivalence_margin: 0 is refused"),
]


@pytest.mark.parametrize(("key", "value", "says"), REFUSED, ids=lambda part: str(part)[:50])
def test_an_impossible_value_is_refused(key: str, value: Any, says: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, changed(**{key.replace(".", "__"): value}))
    assert any(line.startswith(says) for line in message.split("\n  "))


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    (
        {"shares_stochastic_depth": True},
        "runs.copy.shares_stochastic_depth: drop_path is 0: nothing is dropped",
    ),
    (
        {"shares_stochastic_depth": True, "drop_path": 0.2, "average": "examples"},
        "runs.copy.shares_stochastic_depth: the mean over examples is taken before the training",
    ),
    (
        {"shares_stochastic_depth": True, "drop_path": 0.2},
        "runs.copy.shares_stochastic_depth: attention from a cache knows no step's masks",
    ),
    (
        {"transfer": "key", "average": "heads"},
        "runs.copy.average: concerns maps, and transfer is key; remove this key",
    ),
    (
        {"layers": [0, 2], "heads": [0], "heads_per_layer": [[0], [1]]},
        "runs.copy.heads_per_layer: stands instead of heads; remove one of them",
    ),
    (
        {"layers": [2, 0], "heads_per_layer": [[0], [1]]},
        "runs.copy.layers: must stand in order from the input beside heads_per_layer",
    ),
    (
        {"layers": [0, 2], "heads_per_layer": [[0], [1, 1]]},
        "runs.copy.heads_per_layer: [1, 1] names a head twice",
    ),
    (
        {"layers": [0, 2], "heads_per_layer": [[0], [4]]},
        "runs.copy.heads: [4] lie beyond the 4 heads, 0 to 3",
    ),
    (
        {"transfer": "query", "architecture": {**ARCHITECTURE, "heads": 2}},
        "runs.copy.transfer: query needs the teacher's width and heads, 96 and 4; the student has 96 and 2",
    ),
    (
        {"transfer": "value", "architecture": {**ARCHITECTURE, "width": 48}},
        "runs.copy.transfer: value needs the teacher's width and heads, 96 and 4; the student has 48 and 4",
    ),
    (
        {"heads": [0], "architecture": {**ARCHITECTURE, "heads": 2}},
        "runs.copy.heads: cannot be chosen where teacher and student have other numbers",
    ),
    (
        {"layers": [4], "architecture": {**ARCHITECTURE, "depth": 3}},
        "runs.copy.layers: [4] lie beyond the student's 3 layers, 0 to 2",
    ),
    (
        {"initial": "mae", "architecture": {**ARCHITECTURE, "depth": 3}, "layers": [0]},
        "runs.copy.initial: mae has another architecture",
    ),
    (
        {
            "method": "distill_features",
            "feature_loss": {"weight": 1.0},
            "architecture": {**ARCHITECTURE, "width": 48},
        },
        "runs.copy.architecture.width: 48 is not the teacher's, 96, whose features are compared one by one",
    ),
    (
        {"method": "distill_logits", "layers": None, "logit_loss": {"weight": 1.0, "teacher": "mae"}},
        "runs.copy.logit_loss.teacher: 'mae' is not defined; known are",
    ),
    ({"method": "distill_features"}, "runs.copy.feature_loss: needed by method distill_features, and by no"),
]


@pytest.mark.parametrize(("keys", "says"), CONFLICTS, ids=lambda part: str(part)[:60])
def test_keys_of_a_run_that_contradict_each_other_are_refused(
    keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    message = refusal(tmp_path, changed(runs__copy={**CORE["runs"]["copy"], **keys}))
    assert message.startswith(says)


def test_a_temperature_concerns_maps_and_no_means_of_maps(tmp_path: Path) -> None:
    run = {**CORE["runs"]["distill"], "attention_loss": {"weight": 1.0, "temperature": 2.0}}
    for key, value, says in (
        ("transfer", "key", "runs.distill.attention_loss.temperature: concerns maps, and transfer is key"),
        ("average", "heads", "runs.distill.average: a mean of maps has no temperature"),
    ):
        assert refusal(tmp_path, changed(runs__distill={**run, key: value})).startswith(says)


def test_a_fine_tuned_teacher_is_checked_like_a_run(tmp_path: Path) -> None:
    run = CORE["runs"]["finetune"]
    for wrong, says in (
        (
            {"method": "scratch", "layer_decay": 1.0},
            "finetuned_teachers.t.run.method: scratch is not finetune",
        ),
        ({"teacher": "moe"}, "finetuned_teachers.t.run.teacher: 'moe' is not defined; did you mean 'mae'?"),
        (
            {"batch_size": 501},
            "finetuned_teachers.t.run.batch_size: 501 is more than the 500 labelled images",
        ),
        ({"epoch": 3}, "finetuned_teachers.t.run.epoch: unknown key; did you mean 'epochs'?"),
    ):
        values = changed(finetuned_teachers={"t": {"seed": 1, "run": {**run, **wrong}}})
        assert refusal(tmp_path, values).startswith(says)
    study = load(tmp_path, changed(finetuned_teachers={"t": {"seed": 1, "run": run}}))
    assert set(study.tutors.runs) == {"t"}
    assert study.tutors.runs["t"] == study.runs["finetune"]


def test_maps_are_not_stored_as_integers(tmp_path: Path) -> None:
    message = refusal(tmp_path, changed(attention__content="maps", attention__dtype="int8"))
    assert message.startswith("attention.dtype: maps are stored as floats: choose float16 or float32")


def test_mixed_views_need_batches_of_pairs(tmp_path: Path) -> None:
    for key in ("mixup", "cutmix"):
        values = changed(runs__copy__batch_size=25, **{f"views__{key}": 0.8})
        message = refusal(tmp_path, values)
        assert message.startswith(
            "runs.copy.batch_size: 25 is odd, but views.mixup and views.cutmix mix pairs"
        )


def test_heads_are_counted_for_each_layer(tmp_path: Path) -> None:
    run = CORE["runs"]["copy"]
    study = load(tmp_path, changed(runs__copy=run))
    assert study.heads("copy") == ((0, 1, 2, 3),) * 6
    study = load(tmp_path, changed(runs__copy={**run, "layers": [3, 1], "heads": [2, 0]}))
    assert (study.layers("copy"), study.heads("copy")) == ((1, 3), ((0, 2), (0, 2)))
    study = load(tmp_path, changed(runs__copy={**run, "layers": [1, 3], "heads_per_layer": [[3, 0], [1]]}))
    assert study.heads("copy") == ((0, 3), (1,))
    small = {**ARCHITECTURE, "heads": 2, "depth": 4}
    study = load(tmp_path, changed(runs__copy={**run, "architecture": small}))
    assert (study.layers("copy"), study.heads("copy")) == ((0, 1, 2, 3), ((0, 1),) * 4)


def test_an_ensemble_of_a_run_with_itself_needs_two_seeds(tmp_path: Path) -> None:
    message = refusal(tmp_path, changed(seeds=[0]))
    assert message.startswith("ensembles.finetune_finetune: two members of one run need two seeds")


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    message = refusal(tmp_path, changed(data__labelled=0, views__flip=2, seeds="all"))
    for problem in ("data.labelled: 0 is", "views.flip: 2 is", "seeds: 'all' is"):
        assert problem in message


@pytest.mark.parametrize("value", [".nan", ".NaN", ".inf", "-.inf", "1e999"])
@pytest.mark.parametrize("key", ["weight_decay: 0.05", "budget_gb: 1.0", "learning_rate: 0.002"])
def test_nan_and_infinity_are_refused(key: str, value: str, tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert key in text
    name = key.partition(":")[0]
    message = refusal(tmp_path, text.replace(key, f"{name}: {value}", 1))
    assert f".{name}: " in message
    assert ("NaN" if "n" in value.lower()[1:2] else "inf") in message


NAMES = ["a/b", "..", ".", "", "a b", "A", "ä", "a" * 41, "1a", "-a", "a\n", "a\0", "~", "a-b", "a.b"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_could_leave_their_folder_are_refused(name: str, tmp_path: Path) -> None:
    values = changed(name=name)
    for section in NAMED:
        values[section][name] = next(iter(values[section].values()))
    lines = refusal(tmp_path, values).split("\n  ")
    own = () if name == "a/b" else ("name",)  # an experiment's
    for key in (*own, *(f"{section}.{name}" for section in NAMED)):
        assert any(line.startswith(f"{key}: {name!r} is refused: String should match") for line in lines)


# Files


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(StudyError) as caught:
        config.load(path)
    assert well_formed(caught.value, path).startswith("does not exist")


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read: Is a directory"):
        config.load(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "[1, 2]\n", "core\n", "null\n", "---\n"])
def test_a_file_without_keys(text: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text).startswith("holds no keys")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: core\n  seeds: [0]\n", "line 2"),
        ("name: [core\n", "line 2"),
        ("name:\tcore\n\tseeds: 1\n", "line 1"),
        ("name: core\nseeds: [0]\nname: smoke\n", "the key 'name' is given twice"),
        ("runs: {a: 1, a: 2}", "the key 'a' is given twice"),
        ("runs: {b: {a: 1, c: 2, 'a': 2}}", "the key 'a' is given twice"),
        ("{[1, 2]: 3}", "a key must be a word"),
        ("{{a: b}: 3}", "a key must be a word"),
        ("name: a\0b", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("name: !core a", "could not determine a constructor"),
        ("name: *nothing", "undefined alias"),
        ("a: &a [*a]", "recursion"),
        ("a: &a {b: *a}", "recursion"),
        ("day: 2024-13-45", "month must be in 1..12"),
        ("name: a\n---\nname: b\n", "expected a single document"),
        ("[" * 700, "recursion"),
        ("n: " + "9" * 5000, "Exceeds the limit"),
    ],
)
def test_what_is_not_yaml(text: str, says: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith("is not valid YAML: ")
    assert says in message


@pytest.mark.parametrize("content", [b"name: \xff\xfe", "name: core".encode("utf-16"), b"\x00\x01\x02"])
def test_what_is_not_text(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(StudyError) as caught:
        config.load(path)
    assert well_formed(caught.value, path).startswith("is not valid YAML: ")


# As DVC reads it


def ours(text: str) -> Any:
    return yaml.load(text, params_yaml.Loader)


def ruamels(text: str) -> Any:
    return YAML(typ="safe").load(text)


# fmt: off
TRICKY = [
    "1e-3", "1E3", "1e+3", "1.5e3", "1.e3", "1.", ".5", ".5e3", ".5e+3", "+.5", "-1", "+1", "0", "-0", "007",
    "017", "08", "0o17", "0o8", "0x1F", "0x", "0b11", "0b2", "1_000", "1_0.5", "0.1_5", "1__0", "_1", "0_",
    "._5", "1:30", "1:30.5", "12:30:45", "yes", "no", "on", "off", "y", "n", "Y", "N", "Yes", "NO", "true",
    "True", "TRUE", "tRUE", "false", "False", "FALSE", "null", "Null", "NULL", "~", "nUll", ".inf", "-.INF",
    "+.Inf", ".nan", ".NaN", ".NAN", "-.nan", "nan", "inf", "Infinity", "1e", "1e-", "e3", "1.2.3", "1,2",
    "0.0", "00.5", '"1"', "'1e-3'", '"yes"', "2024-01-01", "1-2", "a-b", "train/x", "é", "1e400", "-1e400",
    "123456789012345678901234567890",
]
# fmt: on


@pytest.mark.parametrize(
    "scalar", [*TRICKY, "", "a b", "1 2", "|\n  1", ">-\n  yes", "!!str 1", "!!int '017'"]
)
def test_scalars_are_read_as_ruamel_reads_them(scalar: str) -> None:
    read, expected = ours(f"a: {scalar}")["a"], ruamels(f"a: {scalar}")["a"]
    assert type(read) is type(expected)
    assert read == expected or (math.isnan(read) and math.isnan(expected))
    if not scalar.startswith(("|", ">")):
        assert repr(ours(f"[{scalar}]")) == repr(ruamels(f"[{scalar}]"))


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="+-._0123456789eExobtrufalsnyTINF:~", min_size=1, max_size=7))
@example("0b_")
@example("-_0")
@example("+_")
def test_any_plain_word_is_read_as_ruamel_reads_it(word: str) -> None:
    def outcome(read: Callable[[str], Any]) -> str:
        try:
            return repr(read(f"a: {word}"))
        except Exception:
            return "refused"

    expected = outcome(ruamels)
    # ruamel.yaml fails on some numbers without digits, such as +_, which are words here.
    assert outcome(ours) == expected or expected == "refused"


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {k: 1}\nb: {<<: *x, j: 2}\n",
        "a: &x {k: 1}\nb: {<<: *x, k: 2}\n",
        "z: &z {k: 0}\na: {b: &x {<<: *z, k: 1}}\nc: {<<: *x}\n",
        "a: &x [1, 2]\nb: *x\n",
        "no: 1\non: 2\n1e3: 3\n",
        "a:\nb: ~\n",
        "%YAML 1.2\n---\na: yes\n",
        '{"a": [1, 2.5, true, null, "x"], "b": {}}',
        "a: !!set {x, y}\n",
    ],
)
def test_structures_are_read_as_ruamel_reads_them(text: str) -> None:
    assert ours(text) == ruamels(text)


# Nothing but a study or a StudyError comes out


def anything(source: random.Random, depth: int = 0) -> Any:
    """A random value of what YAML can express, and some more."""
    kind = source.randrange(12 if depth < 3 else 9)
    if kind == 9:
        return [anything(source, depth + 1) for _ in range(source.randrange(4))]
    if kind in (10, 11):
        return {word(source): anything(source, depth + 1) for _ in range(source.randrange(4))}
    return source.choice(
        [
            lambda: source.randint(-3, 40),
            lambda: 10 ** source.randrange(1, 500) * source.choice([1, -1]),
            lambda: source.choice([0.0, -0.0, 0.5, 1.0, 1e300, -1e-300, math.nan, math.inf, -math.inf]),
            lambda: source.choice([True, False, None]),
            lambda: word(source),
            lambda: source.choice([datetime.date(2024, 1, 1), b"\xff", {"a", "b"}, (1,)]),
            lambda: source.choice([CORE[key] for key in CORE]),
            lambda: nested(source.choice([list, dict]), source.choice([30, 400, 2000])),
            source.random,
        ]
    )()


def word(source: random.Random) -> Any:
    odd = [
        "",
        "..",
        "a/b",
        "all",
        "mae",
        "kind",
        "data",
        "[key]",
        "int",
        "x" * 300,
        "é\n",
        1,
        None,
        True,
        0.5,
    ]
    return source.choice([*odd, *CORE, *RUN, *TEACHER])


def nested(kind: type, depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def mutate(source: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """Deletes, replaces or inserts a key at a random place."""
    values = dict(values)
    here: Any = values
    while deeper := [key for key, item in here.items() if isinstance(item, dict) and item]:
        if source.random() < 0.3:
            break
        key = source.choice(deeper)
        here[key] = dict(here[key])  # a copy of the way alone: copy.deepcopy cannot follow deep nesting
        here = here[key]
    key = source.choice(list(here))
    match source.randrange(5):
        case 0:
            del here[key]
        case 1:
            here[word(source)] = anything(source)
        case 2 if isinstance(here[key], list) and here[key]:
            here[key] = [*here[key], anything(source)][source.randrange(2) :]
        case _:
            here[key] = anything(source)
    return values


def outcome_of(path: Path, mutation: Any) -> bool:
    """Whether a mutated file loads; fails unless it loads or is refused as it should be."""
    try:
        study = config.load(path)
    except StudyError as error:
        well_formed(error, path)
        return False
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} instead of a StudyError: {mutation!r:.2000}") from error
    assert isinstance(study, config.Study)
    return True


@pytest.mark.slow
def test_random_values_give_a_study_or_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3000 files; the text is left out, as parsing it takes ten times as long as checking it."""
    path = tmp_path / "params.yaml"
    path.touch()
    source = random.Random(0)
    small = changed()
    small["runs"] = {name: small["runs"][name] for name in ("scratch", "finetune", "copy", "distill")}
    small["ensembles"] = {"finetune_copy": small["ensembles"]["finetune_copy"]}
    loaded = 0
    for _ in range(3000):
        values = small
        for _ in range(source.randrange(1, 3)):
            values = mutate(source, values) or small
        monkeypatch.setattr(yaml, "load", lambda text, loader, values=values: values)
        loaded += outcome_of(path, values)
    assert 30 < loaded < 1500


@pytest.mark.slow
def test_random_texts_give_a_study_or_one_message(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (ROOT / "presets" / "smoke.yaml").read_text(encoding="utf-8")
    source = random.Random(1)
    loaded = 0
    for _ in range(100):
        lines = text.splitlines(keepends=True)
        for _ in range(source.randrange(1, 4)):
            number = source.randrange(len(lines))
            line = lines[number]
            at = source.randrange(len(line))
            inserted = source.choice([*" \t\n:-[]{},#&*!|>'\"%@`é\x00\ufeff0e.", line, "<<: *a", "- "])
            lines[number] = line[:at] + source.choice([inserted, ""]) + line[at + source.randrange(3) :]
        path.write_text("".join(lines), encoding="utf-8")
        loaded += outcome_of(path, "".join(lines))
    assert 0 < loaded < 100


def test_an_unknown_key_of_a_published_set(tmp_path: Path) -> None:
    values = changed()
    values["evaluation"]["sets"] = ["validation", "test", "published"]
    values["evaluation"]["published"] = {"sketch": {"layout": "class_names", "foldr": "x"}}
    assert "evaluation.published.sketch.foldr: unknown key; did you mean 'folder'?" in refusal(
        tmp_path, values
    )


@pytest.mark.parametrize(
    "policy", ["rand", "rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.3", "rand-mmax12-m10"], ids=str
)
def test_policies_of_rand_augment(policy: str, tmp_path: Path) -> None:
    values = changed()
    values["views"]["rand_augment"] = policy
    assert load(tmp_path, values).views.rand_augment == policy


@pytest.mark.parametrize("policy", ["augmix", "rand-m9.5", "rand-z3", "rand-inc2", "rand-m9-", ""], ids=repr)
def test_policies_that_timm_would_not_take(policy: str, tmp_path: Path) -> None:
    values = changed()
    values["views"]["rand_augment"] = policy
    assert "views.rand_augment" in refusal(tmp_path, values)


def test_a_crop_larger_than_the_resized_image(tmp_path: Path) -> None:
    values = changed()
    values["data"]["resize"] = 20
    assert "data.resize: 20 is smaller than image_size, 28" in refusal(tmp_path, values)


def test_masks_are_shared_by_networks_of_equal_depth(tmp_path: Path) -> None:
    values = changed(attention__source="online")
    run = values["runs"]["copy"]
    run |= {"shares_stochastic_depth": True, "drop_path": 0.2}
    assert load(tmp_path, values).runs["copy"].shares_stochastic_depth
    run |= {"architecture": {**ARCHITECTURE, "depth": 3}}
    says = "runs.copy.shares_stochastic_depth: the student has 3 layers, the teacher"
    assert says in refusal(tmp_path, values)


def test_keys_that_came_later_stand_in_no_record_where_they_are_left_out() -> None:
    """So that fingerprints and resolved params of studies without them stay what they are."""
    sizes = {"patch_size": 7, "width": 96, "depth": 6, "heads": 4, "mlp_ratio": 4.0}
    plain = config.Architecture(**sizes)
    assert plain.model_dump(mode="json") == {**sizes, "components": []}
    file = config.FromFile(kind="file", architecture=plain, path="w", sha256="0" * 64)
    assert file.model_dump(mode="json") == {
        "kind": "file", "architecture": {**sizes, "components": []}, "path": "w", "sha256": "0" * 64,
    }  # fmt: skip
    stated = config.Architecture(**sizes, class_token=False, timm="vit_base_patch16_siglip_224")
    assert stated.model_dump() == {
        **sizes, "components": (), "class_token": False, "timm": "vit_base_patch16_siglip_224",
    }  # fmt: skip
    assert stated.tokens(28) == 16
    recipe = {
        "method": "copy",
        "teacher": "mae",
        "layers": "all",
        "learning_rate": 0.1,
        "epochs": 9,
        "batch_size": 8,
    }
    run = config.Run(**recipe, drop_path=0.1)
    assert "shares_stochastic_depth" not in run.model_dump(mode="json")
    shares = config.Run(**recipe, drop_path=0.1, shares_stochastic_depth=True)
    assert shares.model_dump() == {**run.model_dump(), "shares_stochastic_depth": True}
    assert config.Architecture(**sizes, components=("registers",), register_tokens=1).tokens(28) == 18


PUBLISHED = {
    "kind": "timm",
    "name": "vit_base_patch16_224.mae",
    "architecture": {
        "patch_size": 7, "width": 96, "depth": 6, "heads": 4, "mlp_ratio": 4.0, "timm": "vit_base_patch16_224",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("name", "vit_base_patch16_224", "name: 'vit_base_patch16_224' is neither <entry>.<tag> of timm"),
        ("name", "hf-hub:mae", "name: 'hf-hub:mae' is neither"),
        (
            "name",
            "vit_large_patch16_224.mae",
            "architecture.timm: vit_base_patch16_224 is not vit_large_patch16_224",
        ),
        ("sha256", "abc", "sha256: 'abc' is refused"),
        ("architecture.timm", None, "architecture.timm: is missing: say by which entry"),
        ("architecture.register_tokens", 1, "register_tokens: needs the component registers"),
    ],
)
def test_a_published_teacher_is_named_wholly(key: str, value: Any, says: str, tmp_path: Path) -> None:
    for right in ("vit_base_patch16_224.mae", "hf-hub:owner/model", "hf-hub:owner/model@abc"):
        study = load(tmp_path, changed(**{"teachers.mae": {**PUBLISHED, "name": right}}))
        assert study.teachers["mae"].architecture.timm == "vit_base_patch16_224"
    with pytest.raises(StudyError, match=re.escape(says)):
        load(tmp_path, changed(**{"teachers.mae": copy.deepcopy(PUBLISHED), f"teachers.mae.{key}": value}))


def test_a_file_states_mean_and_deviation_together(tmp_path: Path) -> None:
    file = {
        "kind": "file",
        "path": "w",
        "sha256": "0" * 64,
        "architecture": CORE["teachers"]["mae"]["architecture"],
    }
    with pytest.raises(StudyError, match="mean, std: stand together"):
        load(tmp_path, changed(**{"teachers.mae": {**file, "mean": [0.5, 0.5, 0.5]}}))
    with pytest.raises(StudyError, match="format: 'clip' is refused"):
        load(tmp_path, changed(**{"teachers.mae": {**file, "format": "clip"}}))


@pytest.mark.parametrize(
    ("teacher", "student", "says"),
    [
        (
            {"class_token": False},
            {},
            "class_token: the teacher has none; give the student class_token: false",
        ),
        (
            {"components": ["registers"], "register_tokens": 8},
            {"components": ["registers"]},
            "no counterparts",
        ),
    ],
)
def test_a_student_has_no_token_that_its_teacher_lacks(
    teacher: dict[str, Any], student: dict[str, Any], says: str, tmp_path: Path
) -> None:
    sizes = CORE["teachers"]["mae"]["architecture"]
    untrained = {"kind": "untrained", "seed": 0, "architecture": {**sizes, **teacher}}
    changes = {"teachers.mae": untrained, "runs.distill.architecture": {**sizes, **student}}
    with pytest.raises(StudyError, match=says):
        load(tmp_path, changed(**changes))
    load(tmp_path, changed(**{**changes, "runs.distill.architecture": {**sizes, **teacher}}))
