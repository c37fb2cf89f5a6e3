"""Published image sets of shifts: their layouts, their classes, and how models are judged on them."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from attention_transfer.commands import check
from attention_transfer.config import Evaluation
from attention_transfer.data import published, shifted
from attention_transfer.data.image_files import Shape
from attention_transfer.data.published import LEFT_OUT, Published
from attention_transfer.errors import StudyError
from attention_transfer.evaluation.predictions import Predictions
from attention_transfer.layout import Layout

FORM = Shape(3, 8, 8)
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay", "kiwi", "lynx"]


def timms(name: str) -> list[str]:
    """A list that timm ships."""
    return importlib.resources.files("timm.data").joinpath("_info", name).read_text().split()


def put(folder: Path, names: list[str], count: int = 1) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / name / f"{number}.jpg")
    return folder


def evaluation(sets: dict[str, Any], severities: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Evaluation:
    return Evaluation(
        sets=("test", "published"),
        shifts=(),
        severities=severities,
        shift_images=10,
        published=sets,
        calibration_bins=15,
        confidence=0.95,
        bootstrap=10,
    )


def find(folder: Path, classes: list[str] = CLASSES, **given: Any) -> Published:
    the = evaluation({"the": {"folder": str(folder), **given}})
    (what,) = published.wanted(the).values()
    return published.find(what, classes, FORM, seed=0)


def names_of(found: Published) -> list[str]:
    """The folder that each image lies in."""
    return [name.rpartition("/")[0] for name in found.pixels.files.names]


# Which classes a set has


@pytest.mark.parametrize("which", ["a", "r"])
def test_the_classes_of_imagenet_a_and_r_are_timms(which: str, tmp_path: Path) -> None:
    """Two hundred of a thousand, by the names of the folders alone."""
    classes = timms("imagenet_synsets.txt")
    folder = put(tmp_path / which, timms(f"imagenet_{which}_synsets.txt"))
    found = find(folder, sorted(classes), layout="class_names")
    kept = [name for name, group in zip(sorted(classes), found.groups, strict=True) if group != LEFT_OUT]
    assert kept == sorted(timms(f"imagenet_{which}_synsets.txt"))
    assert len(kept) == len(set(found.groups.tolist())) - 1 == 200
    for name, label in zip(names_of(found), found.labels, strict=True):
        assert found.groups[sorted(classes).index(name)] == label


def test_numbered_folders_are_the_classes_in_order(tmp_path: Path) -> None:
    """As in ImageNet-V2, where sorted by their characters 10 comes before 2."""
    found = find(put(tmp_path / "v2", [str(number) for number in range(12)]), layout="class_numbers")
    assert sorted(found.groups) == list(range(12))
    for name, label in zip(names_of(found), found.labels, strict=True):
        assert found.groups[int(name)] == label


def test_a_mapping_merges_classes_and_keeps_the_others_as_wrong_answers(tmp_path: Path) -> None:
    """As of ObjectNet: a chair may be two classes of the task; a model that says `ant` is wrong."""
    folder, mapping = put(tmp_path / "objects", ["pet", "bird"]), tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"pet": ["cat", "dog"], "bird": ["hen", "jay", "kiwi"]}))
    found = find(folder, layout="mapped_names", mapping=str(mapping))
    by_name = dict(zip(names_of(found), found.labels.tolist(), strict=True))
    for name, group in zip(CLASSES, found.groups.tolist(), strict=True):
        expected = {"cat": "pet", "dog": "pet", "hen": "bird", "jay": "bird", "kiwi": "bird"}.get(name)
        assert group == (2 if expected is None else by_name[expected])


def test_corruptions_are_as_many_sets_as_severities(tmp_path: Path) -> None:
    for corruption in ("fog", "frost"):
        for severity in (1, 3):
            put(tmp_path / "c" / corruption / str(severity), CLASSES[:4])
    given = {"layout": "corruptions", "folder": str(tmp_path / "c"), "corruptions": ("fog", "frost")}
    the = evaluation({"c": given}, severities=(1, 3, 5))
    wanted = published.wanted(the)
    assert list(wanted) == [f"c-{kind}-{level}" for kind in ("fog", "frost") for level in (1, 3, 5)]
    assert published.condition(wanted["c-frost-3"]) == "c/frost"
    assert set(published.missing(wanted)) == {"c-fog-5", "c-frost-5"}
    found = published.find(wanted["c-frost-3"], CLASSES, FORM, seed=0)
    assert set(names_of(found)) == set(CLASSES[:4])


@pytest.mark.parametrize("count", [1, 7, 12, 20, 59])
def test_so_many_images_are_drawn_evenly(count: int, tmp_path: Path) -> None:
    folder = put(tmp_path / "r", CLASSES, count=5)
    found = find(folder, layout="class_names", images=count)
    assert len(found.pixels) == len(found.labels) == count
    sizes = np.bincount(found.labels, minlength=12)
    assert sizes.max() - sizes.min() <= 1
    assert found.pixels.files.names == find(folder, layout="class_names", images=count).pixels.files.names
    for name, label in zip(names_of(found), found.labels, strict=True):
        assert found.groups[CLASSES.index(name)] == label


# What is wrong with a folder


def test_a_set_that_is_missing_is_named_with_what_is_expected(tmp_path: Path) -> None:
    the = evaluation({"sketch": {"layout": "class_names", "folder": str(tmp_path / "sketch")}})
    assert published.missing(published.wanted(the))["sketch"].startswith(
        f"{tmp_path / 'sketch'} is not there: expected is <folder>/<class"
    )


@pytest.mark.parametrize(
    ("layout", "names", "message"),
    [
        ("class_names", ["ant", "wolf"], "1 folders that are no classes of the task: wolf"),
        ("class_numbers", ["0", "12"], "1 folders that are no classes of the task: 12"),
        ("class_numbers", ["0", "ant"], "1 folders that are no classes of the task: ant"),
    ],
)
def test_folders_that_are_no_classes(layout: str, names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message):
        find(put(tmp_path / "set", names), layout=layout)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"pet": ["cat"]}, "does not give each folder"),
        ({"pet": ["cat"], "bird": 3}, "does not give each folder"),
        ({"pet": ["cat"], "bird": ["wolf"]}, "1 folders that are no classes of the task: bird"),
        ({"pet": ["cat", "hen"], "bird": ["hen"]}, "gives a class of the task to two names"),
        (None, "does not give each folder"),
    ],
)
def test_a_mapping_that_cannot_be_used(mapping: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mapping.json"
    path.write_text("{" if mapping is None else json.dumps(mapping))
    folder = put(tmp_path / "objects", ["pet", "bird"])
    with pytest.raises(StudyError, match=message):
        find(folder, layout="mapped_names", mapping=str(path))


@pytest.mark.parametrize(
    "given",
    [
        {"layout": "mapped_names"},
        {"layout": "class_names", "mapping": "m.json"},
        {"layout": "corruptions"},
        {"layout": "class_numbers", "corruptions": ("fog",)},
        {"layout": "corruptions", "corruptions": ("fog", "fog")},
    ],
)
def test_keys_that_do_not_fit_the_layout(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"needed by layout|names a value twice"):
        evaluation({"the": {"folder": "f", **given}})


# On disk


def test_a_set_is_kept_and_read_as_it_was_found(tmp_path: Path) -> None:
    folder = put(tmp_path / "r", CLASSES[2:9], count=3)
    the = evaluation({"r": {"layout": "class_names", "folder": str(folder), "images": 10}})
    recipe, nothing = {"seed": 0}, np.arange(0)
    images = shifted.ImageSet(np.zeros((1, 3, 8, 8), np.uint8), np.zeros(1, np.int64))
    made = shifted.make(
        tmp_path / "out", published.wanted(the), images, nothing, recipe, classes=CLASSES, form=FORM
    )
    expected = published.find(published.wanted(the)["r"], CLASSES, FORM, seed=0)
    found, numbers = shifted.load(tmp_path / "out", "r")
    assert found.images.files.names == expected.pixels.files.names
    assert (found.labels == expected.labels).all()
    assert (numbers == np.arange(10)).all()
    groups = shifted.groups(tmp_path / "out", "r")
    assert groups is not None
    assert (groups == expected.groups).all()
    # What is there is kept, even where the folder is gone since; a changed file is found when it is shown.
    folder.rename(tmp_path / "gone")
    assert (
        shifted.make(
            tmp_path / "out", published.wanted(the), images, nothing, recipe, classes=CLASSES, form=FORM
        )
        == made
    )


def test_check_names_what_was_missing_and_is_there_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets that were made, and those still missing, are no news; nor is anything before the shifts are made."""
    monkeypatch.chdir(tmp_path)
    given = {name: {"layout": "class_names", "folder": name} for name in ("early", "late", "never")}
    given["c"] = {"layout": "corruptions", "folder": "c", "corruptions": ("fog", "frost")}  # type: ignore[dict-item]
    study = tiny_study.make_study("scratch", {"name": "imagenet1k"})
    study = study.model_copy(update={"evaluation": evaluation(given, severities=(1,))})
    monkeypatch.setattr(check.config, "load", lambda _: study)
    monkeypatch.setattr(check.config, "experiments", lambda _: {})
    monkeypatch.setattr(check.graph_file, "check", lambda _: None)
    (tmp_path / "studies" / "imagenet1k").mkdir(parents=True)
    (tmp_path / "studies" / "imagenet1k" / "dvc.yaml").touch()
    put(tmp_path / "early", CLASSES[:2])
    put(tmp_path / "c" / "fog" / "1", CLASSES[:2])
    assert check.examine(Path("any.yaml"))["notes"] == []
    sets = published.wanted(study.evaluation)
    there = {name: what for name, what in sets.items() if name not in published.missing(sets)}
    images = shifted.ImageSet(np.zeros((1, 3, 8, 8), np.uint8), np.zeros(1, np.int64))
    shifted.make(
        Layout.of(study).shifts, there, images, np.arange(0), {"seed": 0}, classes=CLASSES, form=FORM
    )
    assert check.examine(Path("any.yaml"))["notes"] == []
    put(tmp_path / "late", CLASSES[:2])
    put(tmp_path / "c" / "frost" / "1", CLASSES[:2])
    [note] = check.examine(Path("any.yaml"))["notes"]
    assert note.startswith("evaluation.published: late, c: not there when")
    assert "dvc repro -f studies/imagenet1k/dvc.yaml:shifts" in note


# How a model is judged


@settings(max_examples=80, deadline=None)
@given(
    groups=st.lists(st.integers(-1, 4), min_size=2, max_size=12).filter(lambda values: max(values) >= 0),
    seed=st.integers(0, 10**6),
)
def test_the_largest_logit_of_a_group_counts(groups: list[int], seed: int) -> None:
    numbers = sorted({group for group in groups if group >= 0})
    dense = [numbers.index(group) if group >= 0 else -1 for group in groups]
    logits = torch.randn(7, len(groups), generator=torch.Generator().manual_seed(seed))
    labels = torch.randint(len(numbers), (7,), generator=torch.Generator().manual_seed(seed))
    found = Predictions(logits, labels, torch.arange(7), torch.tensor(dense))
    for row in range(7):
        best = {}
        for column, group in enumerate(dense):
            if group >= 0:
                best[group] = max(best.get(group, -np.inf), float(logits[row, column]))
        assert found.judged[row].tolist() == [best[group] for group in range(len(numbers))]
        assert bool(found.correct[row]) == (max(best, key=lambda group: best[group]) == int(labels[row]))
