"""Shifted sets on disk: made once, only those that are wanted, and damage is seen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention_transfer.data import shifted, shifts
from attention_transfer.data.image_files import Shape
from attention_transfer.data.images import ImageSet
from attention_transfer.errors import StudyError
from attention_transfer.files import write_sealed

TEST = ImageSet(shifts.digits(16, 1)[0][:60], shifts.digits(16, 1)[1][:60])
INDICES = shifted.subset(TEST.labels, 20, seed=0)
RECIPE = {"images": "a", "indices": "b", "seed": 0, "code": "c"}
FOG = {"fog-1": {"shift": "fog", "severity": 1}}
JPEG = {"jpeg-5": {"shift": "jpeg", "severity": 5}}
DIGITS = {"digits": {"image_size": 16, "channels": 1}}
BOTH = {**FOG, **JPEG}


def make(folder: Path, sets: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return shifted.make(folder, sets, TEST, INDICES, {**RECIPE, **changes}, classes=[], form=Shape(1, 16, 16))


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every set: an atomic rewrite changes the inode."""
    return {
        path.stem: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("*.npz")
        if path.name != shifted.CONTACT_SHEET
    }


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_set_holds_the_shifted_images(tmp_path: Path) -> None:
    make(tmp_path, {**BOTH, **DIGITS})
    for name, shift, severity in (("fog-1", "fog", 1), ("jpeg-5", "jpeg", 5)):
        images, examples = shifted.load(tmp_path, name)
        assert np.array_equal(images.images, shifts.corrupt(TEST.images[INDICES], shift, severity, seed=0))
        assert np.array_equal(images.labels, TEST.labels[INDICES])
        assert np.array_equal(examples, INDICES)
    images, examples = shifted.load(tmp_path, "digits")
    assert np.array_equal(images.images, shifts.digits(16, 1)[0])
    assert np.array_equal(examples, np.arange(len(images)))
    with np.load(tmp_path / shifted.CONTACT_SHEET) as sheet:
        assert list(sheet["names"]) == ["clean", "fog", "jpeg"]
        assert list(sheet["severities"]) == [1, 5]


def test_a_new_shift_computes_that_one_alone(tmp_path: Path) -> None:
    make(tmp_path, FOG)
    before = stamps(tmp_path)
    make(tmp_path, BOTH)
    after = stamps(tmp_path)
    assert set(after) == {"fog-1", "jpeg-5"}
    assert after["fog-1"] == before["fog-1"]


def test_nothing_new_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, before = make(tmp_path, {**BOTH, **DIGITS}), stamps(tmp_path)

    def fails(*arguments: Any) -> None:
        raise AssertionError("a set was made again")

    monkeypatch.setattr(shifted, "_render", fails)
    assert make(tmp_path, {**DIGITS, **JPEG, **FOG}) == manifest
    assert stamps(tmp_path) == before


def test_a_shift_that_is_no_longer_wanted_goes(tmp_path: Path) -> None:
    make(tmp_path, BOTH)
    before = stamps(tmp_path)
    (tmp_path / ".tmp-1-fog-1.npz").touch()  # of a killed run
    assert set(make(tmp_path, FOG)) == {"fog-1"}
    assert files(tmp_path) == {"fog-1.npz", shifted.MANIFEST, shifted.CONTACT_SHEET}
    assert stamps(tmp_path)["fog-1"] == before["fog-1"]


@pytest.mark.parametrize("key", list(RECIPE))
def test_another_recipe_makes_every_set_anew(key: str, tmp_path: Path) -> None:
    first, before = make(tmp_path, BOTH), stamps(tmp_path)
    second, after = make(tmp_path, BOTH, **{key: 7}), stamps(tmp_path)
    for name in BOTH:
        assert first[name]["fingerprint"] != second[name]["fingerprint"]
        assert before[name] != after[name]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "swap"])
def test_a_damaged_set_is_refused_and_made_again(damage: str, tmp_path: Path) -> None:
    manifest = make(tmp_path, BOTH)
    path, other = tmp_path / "fog-1.npz", tmp_path / "jpeg-5.npz"
    whole, before = path.read_bytes(), stamps(tmp_path)
    match damage:
        case "flip":
            path.write_bytes(whole[:3000] + bytes([whole[3000] ^ 4]) + whole[3001:])
        case "truncate":
            path.write_bytes(whole[:-1])
        case "empty":
            path.write_bytes(b"")
        case "delete":
            path.unlink()
        case "swap":
            path.write_bytes(other.read_bytes())
    with pytest.raises(StudyError, match=re.escape(f"{path}: is missing or damaged")) as caught:
        shifted.load(tmp_path, "fog-1")
    assert "python -m attention_transfer remake shifts" in caught.value.remedy
    assert make(tmp_path, BOTH) == manifest
    shifted.load(tmp_path, "fog-1")
    assert stamps(tmp_path)["jpeg-5"] == before["jpeg-5"]


def test_a_set_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path, BOTH)
    write_sealed(tmp_path / shifted.MANIFEST, {"fog-1": made["fog-1"]})
    with pytest.raises(StudyError, match="missing or damaged"):
        shifted.load(tmp_path, "jpeg-5")


def test_a_damaged_manifest_is_refused_and_made_again(tmp_path: Path) -> None:
    manifest = make(tmp_path, FOG)
    whole = (tmp_path / shifted.MANIFEST).read_text()
    for content in ("{", "[1]", "", '{"fog-1": {}}', whole.replace("fog-1", "fog-2")):
        (tmp_path / shifted.MANIFEST).write_text(content)
        with pytest.raises(StudyError, match="is damaged"):
            shifted.manifest(tmp_path)
        assert make(tmp_path, FOG) == manifest


def test_the_subset_is_stratified_and_repeatable() -> None:
    labels = np.repeat(np.arange(5), 40)
    chosen = shifted.subset(labels, 50, seed=1)
    assert np.array_equal(chosen, shifted.subset(labels, 50, seed=1))
    assert not np.array_equal(chosen, shifted.subset(labels, 50, seed=2))
    assert (np.diff(chosen) > 0).all()
    assert list(np.bincount(labels[chosen])) == [10] * 5
    assert np.array_equal(shifted.subset(labels, 200, seed=1), np.arange(200))


def test_more_images_than_there_are_is_refused() -> None:
    with pytest.raises(StudyError, match="61 images are more than the 60 test images"):
        shifted.subset(TEST.labels, 61, seed=0)
