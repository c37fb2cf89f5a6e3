"""The shifted image sets of a study on disk: made once, checksummed, kept while their recipe holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attention_transfer.config import Data, Evaluation
from attention_transfer.data import published
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Shape
from attention_transfer.data.images import ImageSet
from attention_transfer.errors import StudyError, repro
from attention_transfer.files import atomic, fingerprint, read_sealed, write_sealed, xxh3

MANIFEST = "manifest.json"
CONTACT_SHEET = "contact_sheet.npz"
DIGITS = "digits"
GROUPS = "groups"  # key of a published set's file


def name(shift: str, severity: int) -> str:
    """File and set name of a shift at a severity."""
    return f"{shift}-{severity}"


def wanted(evaluation: Evaluation, data: Data) -> dict[str, dict[str, Any]]:
    """Every set that the study evaluates on beside its own splits, with what it is made from."""
    sets: dict[str, dict[str, Any]] = {}
    if "shifts" in evaluation.sets:
        for shift in evaluation.shifts:
            for severity in evaluation.severities:
                sets[name(shift, severity)] = {"shift": shift, "severity": severity}
    if DIGITS in evaluation.sets:
        sets[DIGITS] = {"image_size": data.image_size, "channels": data.channels}
    return sets | published.wanted(evaluation)


def made(folder: Path, evaluation: Evaluation, data: Data) -> dict[str, dict[str, Any]]:
    """Those of `wanted` that are there: all but published ones that are missing on this machine."""
    sets = wanted(evaluation, data)
    there = manifest(folder) if evaluation.published else sets
    return {name: what for name, what in sets.items() if name in there}


def arrived(folder: Path, evaluation: Evaluation) -> list[str]:
    """Entries of `evaluation.published` with sets that were missing when the sets were made, and are there now.

    Raises:
        StudyError: the manifest is damaged.
    """
    if not evaluation.published or not (folder / MANIFEST).exists():
        return []
    there, sets = manifest(folder), published.wanted(evaluation)
    missing = published.missing(sets)
    late = [what["published"] for name, what in sets.items() if name not in there and name not in missing]
    return list(dict.fromkeys(late))


def subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The same test images for each shift, stratified: sorted int64 indices (count,)."""
    if count > len(labels):
        raise StudyError(
            f"{count} images are more than the {len(labels)} test images",
            where="evaluation.shift_images",
            remedy=f"set it to {len(labels)} or fewer",
        )
    if count == len(labels):
        return np.arange(count)
    from sklearn.model_selection import train_test_split  # 1 s, and reading needs none of it

    chosen, _ = train_test_split(np.arange(len(labels)), train_size=count, stratify=labels, random_state=seed)
    return np.sort(chosen)


def make(
    folder: Path,
    sets: dict[str, dict[str, Any]],
    test: ImageSet,
    indices: np.ndarray,
    recipe: dict[str, Any],
    *,
    classes: list[str],
    form: Shape,
) -> dict[str, Any]:
    """Writes every set that is not there yet, removes those that are no longer wanted.

    Args:
        sets: as `wanted` says; published ones that are not there are not among them.
        classes: of the task.
        form: of the images of published sets.

    Returns:
        The manifest, which it writes last: by set name its fingerprint and the checksum of its images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _manifest(folder)
    manifest: dict[str, Any] = {}
    for set_name, what in sets.items():
        made_from = fingerprint({**recipe, **what})
        entry = before.get(set_name, {})
        if entry.get("fingerprint") != made_from or not _whole(folder, set_name, entry):
            if "published" in what:
                found = published.find(what, classes, form, seed=recipe["seed"])
                found.save(folder / f"{set_name}.npz")
            else:
                images, labels, examples = _render(what, test, indices, recipe["seed"])
                with atomic(folder / f"{set_name}.npz") as temporary, temporary.open("wb") as file:
                    np.savez(file, images=images, labels=labels, examples=examples)
            entry = {"fingerprint": made_from, "checksum": _checksum(folder, set_name)}
        manifest[set_name] = entry
    _contact_sheet(folder, sets, test, indices, recipe["seed"])
    write_sealed(folder / MANIFEST, manifest)
    keep = {f"{set_name}.npz" for set_name in sets} | {MANIFEST, CONTACT_SHEET}
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
    return manifest


def _render(
    what: dict[str, Any], test: ImageSet, indices: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from attention_transfer.data import shifts  # scipy and scikit-learn, as above

    if "shift" in what:
        images = shifts.corrupt(test.images[indices], what["shift"], what["severity"], seed=seed)
        return images, test.labels[indices], indices
    images, labels = shifts.digits(what["image_size"], what["channels"])
    return images, labels, np.arange(len(labels))


def _contact_sheet(
    folder: Path, sets: dict[str, dict[str, Any]], test: ImageSet, indices: np.ndarray, seed: int
) -> None:
    names = list(dict.fromkeys(what["shift"] for what in sets.values() if "shift" in what))
    severities = sorted({what["severity"] for what in sets.values() if "shift" in what})
    if names:
        from attention_transfer.data import shifts

        sheet = shifts.contact_sheet(test.images[indices[0]], names, severities, seed)
        with atomic(folder / CONTACT_SHEET) as temporary, temporary.open("wb") as file:
            np.savez(file, sheet=sheet, names=np.array(["clean", *names]), severities=np.array(severities))


def _manifest(folder: Path) -> dict[str, Any]:
    """The last manifest; empty if there is none that can be read, and then every set is made."""
    try:
        return dict(manifest(folder))
    except StudyError:
        return {}


def manifest(folder: Path) -> dict[str, Any]:
    """By set name, fingerprint and checksum.

    Raises:
        StudyError: it is missing or damaged.
    """
    return read_sealed(folder / MANIFEST, made_by="shifts")


def load(folder: Path, set_name: str) -> tuple[ImageSet, np.ndarray]:
    """Images with labels, and the images' numbers in the test split (or in the other data set).

    Raises:
        StudyError: the file is missing or is not the one in the manifest.
    """
    with _arrays(folder, set_name) as arrays:
        if GROUPS in arrays:
            pixels = FilePixels.of(arrays)
            return ImageSet(pixels, arrays["labels"]), np.arange(len(pixels))
        return ImageSet(arrays["images"], arrays["labels"]), arrays["examples"]


def groups(folder: Path, set_name: str) -> np.ndarray | None:
    """Of a published set, for each class of the task the label that it counts as; None: the classes themselves.

    Raises:
        StudyError: as `load`.
    """
    with _arrays(folder, set_name) as arrays:
        return arrays.get(GROUPS)


@contextlib.contextmanager
def _arrays(folder: Path, set_name: str) -> Iterator[Mapping[str, np.ndarray]]:
    path = folder / f"{set_name}.npz"
    if not _whole(folder, set_name, manifest(folder).get(set_name, {})):
        raise StudyError(
            "is missing or damaged: its checksum is not the recorded one",
            where=str(path),
            remedy=f"make it anew: {repro('shifts', again=True)}",
        )
    with np.load(path, allow_pickle=False) as arrays:
        yield arrays


def _whole(folder: Path, set_name: str, entry: dict[str, str]) -> bool:
    return (folder / f"{set_name}.npz").is_file() and entry.get("checksum") == _checksum(folder, set_name)


def _checksum(folder: Path, set_name: str) -> str:
    return xxh3(folder / f"{set_name}.npz")
