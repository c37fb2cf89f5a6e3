"""How many images and classes a study has: read where the images have been read, known, or stated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attention_transfer import plan
from attention_transfer.config import BUILT_IN, PRETRAINING_IMAGES, Pretrained, Study
from attention_transfer.data import images, shifted
from attention_transfer.data.pretraining_images import DIGITS, count_in_files
from attention_transfer.data.sources import TEST_DIGITS
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout

TRAIN, TEST = "train", "test"


@dataclass(frozen=True)
class Counts:
    """Images.

    Attributes:
        train: all training images; where nobody knows, those that the study draws.
        test: 0 where nobody knows.
        shifted: by name of a set beside validation and test.
        unknown: sets that are left out, because nobody knows how many images they have.
    """

    train: int
    test: int
    shifted: dict[str, int]
    unknown: tuple[str, ...]
    classes: int


def count(study: Study, layout: Layout, stated: Mapping[str, int], classes: int | None) -> Counts:
    """Of a study.

    Args:
        stated: by the user, for `train`, `test`, and names of `evaluation.published`.
        classes: as stated.

    Raises:
        StudyError: nobody knows the number of classes, or a stated name is none of those.
    """
    known = {TRAIN, TEST, *study.evaluation.published}
    if wrong := sorted(stated.keys() - known):
        raise StudyError(
            f"{wrong[0]} is none of the study's image sets",
            where="--images",
            remedy=f"choose among {', '.join(sorted(known))}",
        )
    train, test = _own(study, layout, stated)
    sets: dict[str, int | None] = {"test": test} if "test" in study.evaluation.sets else {}
    for name, what in shifted.wanted(study.evaluation, study.data).items():
        if "published" in what:
            found = stated.get(what["published"], what["images"])
            sets[name] = found if what["images"] is None else min(found, what["images"])
        else:
            sets[name] = study.evaluation.shift_images if "shift" in what else DIGITS
    return Counts(
        train=train,
        test=test or 0,
        shifted={name: size for name, size in sets.items() if size is not None and name != "test"},
        unknown=tuple(name for name, size in sets.items() if size is None),
        classes=_classes(study, layout, classes),
    )


def for_pretraining(study: Study, teacher: Pretrained, train: int) -> int:
    """Images that a teacher is pre-trained on.

    Args:
        train: all training images.

    Raises:
        StudyError: its folder of images is not there.
    """
    if teacher.images == "digits":
        return DIGITS
    if teacher.images in PRETRAINING_IMAGES:
        return train - study.data.validation
    return count_in_files(Path(teacher.images))


def _own(study: Study, layout: Layout, stated: Mapping[str, int]) -> tuple[int, int | None]:
    train, test, read = plan.image_counts(layout)
    drawn = study.data.labelled + study.data.validation
    if not read and study.data.source == "digits":
        train, test = DIGITS - TEST_DIGITS, TEST_DIGITS
    elif not read and study.data.source not in BUILT_IN:
        return stated.get(TRAIN, drawn), stated.get(TEST)
    return train, test


def _classes(study: Study, layout: Layout, stated: int | None) -> int:
    if (layout.images / images.DESCRIPTION).is_file():
        return len(images.describe(layout.images).classes)
    found = 10 if study.data.source in BUILT_IN else stated
    if found is None:
        raise StudyError(
            "its images have not been read, so that nobody knows how many classes they have",
            where=f"study {study.name}",
            remedy="state it: --classes 1000",
        )
    return found
