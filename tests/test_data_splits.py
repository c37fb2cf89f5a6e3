"""Splits: disjoint, stratified, repeatable, and stored so that damage is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_transfer.config import Data
from attention_transfer.data import splits
from attention_transfer.errors import StudyError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 120))


def data(**changes: Any) -> Data:
    values: dict[str, Any] = {
        "source": "fashion-mnist",
        "folder": "data",
        "train_split": "train",
        "test_split": "test",
        "resize": 28,
        "image_size": 28,
        "channels": 1,
        "labelled": 100,
        "validation": 200,
        "seed": 0,
    }
    return Data(**{**values, **changes})


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(8, 40), min_size=2, max_size=6),
    labelled=st.integers(6, 20),
    validation=st.integers(6, 20),
    seed=st.integers(0, 2**31 - 2),
)
def test_splits_are_disjoint_and_stratified(
    counts: list[int], labelled: int, validation: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if labelled + validation + len(counts) > len(labels):
        labelled = validation = len(counts)
    drawn = splits.draw(labels, data(labelled=labelled, validation=validation, seed=seed))
    assert tuple(drawn) == splits.NAMES
    assert {name: len(indices) for name, indices in drawn.items()} == {
        "labelled": labelled,
        "validation": validation,
        "pretrain": len(labels) - validation,
    }
    for indices in drawn.values():
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()
    together = np.concatenate([drawn["validation"], drawn["pretrain"]])
    assert sorted(together) == list(range(len(labels)))
    assert np.isin(drawn["labelled"], drawn["pretrain"]).all()
    for name, size in (("validation", validation), ("labelled", labelled)):
        share = size * np.array(counts) / len(labels)
        found = np.bincount(labels[drawn[name]], minlength=len(counts))
        assert (np.abs(found - share) < 2).all(), (name, found, share)


def test_a_balanced_set_is_split_evenly() -> None:
    drawn = splits.draw(LABELS, data())
    assert set(np.bincount(LABELS[drawn["labelled"]])) == {10}
    assert set(np.bincount(LABELS[drawn["validation"]])) == {20}


def test_other_images_stay_when_labels_are_added() -> None:
    few, many = splits.draw(LABELS, data(labelled=10)), splits.draw(LABELS, data(labelled=1000))
    assert np.array_equal(few["validation"], many["validation"])
    assert np.array_equal(few["pretrain"], many["pretrain"])
    assert np.array_equal(many["labelled"], many["pretrain"])


def test_the_seed_decides_the_draw() -> None:
    first, same, other = (splits.draw(LABELS, data(seed=seed)) for seed in (3, 3, 4))
    for name in splits.NAMES:
        assert np.array_equal(first[name], same[name])
        assert not np.array_equal(first[name], other[name])


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"labelled": 9}, "data.labelled", "9 images cannot hold each of the 10 classes"),
        ({"validation": 9}, "data.validation", "9 images cannot hold each of the 10 classes"),
        ({"labelled": 1001}, "data.labelled, data.validation", "more than the 1200 training images"),
        ({"validation": 1195, "labelled": 10}, "data.labelled, data.validation", "more than the 1200"),
        ({"validation": 1195 - 10, "labelled": 14}, "data.labelled, data.validation", "no stratified split"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], key: str, says: str) -> None:
    with pytest.raises(StudyError, match=says) as caught:
        splits.draw(LABELS, data(**changes))
    assert caught.value.where == key


def test_a_class_of_one_image_is_refused() -> None:
    with pytest.raises(StudyError, match="smallest class has 1 images"):
        splits.draw(np.append(LABELS, 10), data())


# Index files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    splits.save(tmp_path, splits.draw(LABELS, data()))
    return tmp_path


def test_what_was_saved_is_loaded(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "labelled.txt",
        "pretrain.txt",
        "validation.txt",
    ]
    for name, indices in splits.draw(LABELS, data()).items():
        found = splits.load(folder, name)
        assert found.dtype == np.int64
        assert np.array_equal(found, indices)
        lines = (folder / f"{name}.txt").read_text().splitlines()
        assert lines[:-1] == [str(index) for index in indices]


def test_every_truncation_is_seen(folder: Path) -> None:
    path = folder / "labelled.txt"
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # without its last newline the file says the same
        path.write_bytes(whole[:length])
        with pytest.raises(StudyError, match=r"is damaged|cannot be read") as caught:
            splits.load(folder, "labelled")
        assert caught.value.where == str(path)
        assert "python -m attention_transfer remake split" in caught.value.remedy


def edits(lines: list[str]) -> dict[str, list[str]]:
    return {
        "a line less": [*lines[:5], *lines[6:]],
        "a line more": [*lines[:-1], "1200", lines[-1]],
        "a line twice": [*lines[:5], lines[4], *lines[6:]],
        "two lines swapped": [*lines[:5], lines[6], lines[5], *lines[7:]],
        "a word": [*lines[:5], "five", *lines[6:]],
        "a fraction": [*lines[:5], f"{lines[5]}.0", *lines[6:]],
        "an empty line": [*lines[:5], "", *lines[5:]],
        "another count": [*lines[:-1], "# 99 indices"],
        "no count": lines[:-1],
        "no indices": ["# 100 indices"],
        "another number": [*lines[:4], str((int(lines[3]) + int(lines[5])) // 2), *lines[5:]],
        "another script": [*lines[:5], "é", *lines[6:]],
    }


@pytest.mark.parametrize("edit", list(edits(["0"] * 10)))
def test_an_edited_file_is_refused(edit: str, folder: Path) -> None:
    path = folder / "labelled.txt"
    changed = edits(path.read_text().splitlines())[edit]
    path.write_text("\n".join(changed) + "\n", encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        splits.load(folder, "labelled")
    assert caught.value.where == str(path)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "validation.txt").unlink()
    with pytest.raises(StudyError, match=r"validation\.txt: cannot be read"):
        splits.load(folder, "validation")
