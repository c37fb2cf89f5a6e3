"""Images in the layouts that others publish them in: Parquet shards, iNaturalist's trees, COCO's flat folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from torchvision.datasets import INaturalist

from attention_transfer.config import Data
from attention_transfer.data import image_files, images, pretraining_images, sources, workers
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Shape
from attention_transfer.data.images import ImageSet
from attention_transfer.errors import StudyError

CLASSES = ["wolf", "cat", "dog"]  # not sorted: a label is a place in this list
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workers.WORKERS, "2")


def jpeg(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40 + seed, 30), Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def read(folder: Path, **changes: Any) -> tuple[list[str], dict[str, ImageSet]]:
    values: dict[str, Any] = {
        "source": "files", "folder": str(folder), "train_split": "train", "test_split": "test", "resize": 28,
        "image_size": 24, "channels": 3, "labelled": 4, "validation": 2, "seed": 0,
    }  # fmt: skip
    return sources.read(Data(**values | changes))


# Parquet


def folders(root: Path) -> Path:
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                jpeg(root / split / name / f"{number}.jpg", 10 * label + number)
    return root


def table_of(paths: list[Path], *, named: bool = True) -> pa.Table:
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    labels = [CLASSES.index(path.parent.name) for path in paths]
    table = pa.table({"image": pa.array(images, IMAGE), "label": pa.array(labels, pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    # As `datasets` writes it.
    written = {"huggingface": json.dumps({"info": {"features": features}})} if named else {}
    return table.replace_schema_metadata(written)


def sharded(root: Path, target: Path, *, named: bool = True) -> Path:
    """The same images in shards of five, in row groups of two, in another order."""
    target.mkdir()
    for split in ("train", "test"):
        paths = sorted((root / split).rglob("*.jpg"), key=lambda path: path.name)
        count = math.ceil(len(paths) / 5)
        for number in range(count):
            table = table_of(paths[5 * number : 5 * number + 5], named=named)
            parquet.write_table(
                table, target / f"{split}-{number:05d}-of-{count:05d}.parquet", row_group_size=2
            )
    return target


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return sharded(folders(tmp_path / "folders"), tmp_path / "shards")


def by_class(classes: list[str], images: ImageSet) -> dict[str, list[bytes]]:
    return {
        name: sorted(image.tobytes() for image in images.images[np.flatnonzero(images.labels == label)])
        for label, name in enumerate(classes)
    }


def test_shards_are_the_folder(tmp_path: Path, shards: Path) -> None:
    classes, found = read(shards)
    expected_classes, expected = read(tmp_path / "folders")
    assert classes == CLASSES
    assert expected_classes == sorted(CLASSES)
    for split in ("train", "test"):
        assert by_class(classes, found[split]) == by_class(expected_classes, expected[split])
        chosen = np.array([5, 0, 5, 2])
        np.testing.assert_array_equal(found[split].images[chosen], found[split].images[:][chosen])


def test_a_shard_of_one_file_and_a_folder_of_shards(shards: Path) -> None:
    """`train.parquet`, and `train/*.parquet` as some data sets have it."""
    classes, sets = read(shards)
    expected = {split: by_class(classes, sets[split]) for split in sets}
    (shards / "train").mkdir()
    for path in shards.glob("train-*.parquet"):
        path.rename(shards / "train" / path.name)
    tests = sorted(shards.glob("test-*.parquet"))
    whole = pa.concat_tables([parquet.read_table(path) for path in tests])
    for path in tests:
        path.unlink()
    parquet.write_table(whole, shards / "test.parquet")
    _, found = read(shards)
    assert {split: by_class(classes, found[split]) for split in found} == expected


def test_class_names_stand_in_a_file_where_the_shards_have_none(tmp_path: Path) -> None:
    shards = sharded(folders(tmp_path / "folders"), tmp_path / "shards", named=False)
    with pytest.raises(StudyError, match="does not say what its classes are called") as caught:
        read(shards)
    assert "classes.txt" in caught.value.remedy
    (shards / "classes.txt").write_text("a wolf\na cat\na dog\n")
    classes, found = read(shards)
    assert classes == ["a wolf", "a cat", "a dog"]
    assert np.bincount(found["train"].labels).tolist() == [4, 4, 4]
    (shards / "classes.txt").write_text("a wolf\na cat\na cat\n")
    with pytest.raises(StudyError, match="names a class twice"):
        read(shards)
    (shards / "classes.txt").write_text("a wolf\na cat\n")
    with pytest.raises(StudyError, match="has the label 2 in row"):
        read(shards)


def rewritten(path: Path, change: str) -> None:
    """The shard with something in it that is not as it should be."""
    table = parquet.read_table(path)
    image, label = table.column("image"), table.column("label")
    match change:
        case "no image column":
            table = table.rename_columns(["img", "label"])
        case "no label column":
            table = table.rename_columns(["image", "fine_label"])
        case "text as labels":
            table = table.set_column(1, "label", label.cast(pa.string()))
        case "no bytes":
            paths = pa.array([{"path": "a.jpg"}] * len(table), pa.struct({"path": pa.string()}))
            table = table.set_column(0, "image", paths)
        case "an image without a label":
            table = table.set_column(1, "label", pa.array([0, 1, -1, 0, 0][: len(table)], pa.int64()))
        case "a row that is no image":
            values = image.to_pylist()
            values[3]["bytes"] = b"<html>" * 9
            table = table.set_column(0, "image", pa.array(values, IMAGE))
        case "other classes":
            table = table.replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["x", "y", "z"]}}}})}
            )
    parquet.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no image column", "has no column 'image' but img, label"),
        ("no label column", "has no column 'label' but image, fine_label"),
        ("text as labels", "has no numbers in its column 'label', which is string"),
        ("no bytes", "has no bytes in its column 'image'"),
        ("an image without a label", "has no label in row 2"),
        ("a row that is no image", "is no image that can be read"),
        ("other classes", "has other classes than train-00000-of-00003.parquet"),
    ],
)
def test_a_shard_that_cannot_be_used_is_named(change: str, message: str, shards: Path) -> None:
    path = shards / "train-00001-of-00003.parquet"
    rewritten(path, change)
    with pytest.raises(StudyError, match=message) as caught:
        read(shards)
    assert str(path) in caught.value.where


@pytest.mark.parametrize("damage", ["cut", "no Parquet", "a page"])
def test_a_damaged_shard_is_named(damage: str, shards: Path) -> None:
    path = shards / "test-00000-of-00002.parquet"
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            content = content[: len(content) // 2]
        case "no Parquet":
            content = bytearray(b"PK" * 500)
        case _:
            content[4:60] = b"\xff" * 56  # the header of the first page
    path.write_bytes(content)
    with pytest.raises(StudyError, match="cannot be read as Parquet") as caught:
        read(shards)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("change", ["another image", "cut", "gone", "fewer rows"])
def test_a_shard_that_changes_after_indexing_is_named(change: str, shards: Path) -> None:
    pixels = read(shards)[1]["train"].images
    pixels[:]  # so that what the processes remember is old
    path = shards / "train-00001-of-00003.parquet"
    table = parquet.read_table(path)
    match change:
        case "another image":
            values = table.column("image").to_pylist()
            values[2], values[3] = values[3], values[2]
            parquet.write_table(table.set_column(0, "image", pa.array(values, IMAGE)), path, row_group_size=2)
        case "cut":
            path.write_bytes(path.read_bytes()[:-50])
        case "gone":
            path.unlink()
        case _:
            parquet.write_table(table.slice(0, 1), path)
    with pytest.raises(StudyError, match=r"cannot be read|is not what was indexed") as caught:
        pixels[:]
    assert str(path) in caught.value.where


# iNaturalist


TREE = {"Aves": ["0", "2"], "Plantae": ["1"]}  # ids run through all the groups
SPECIES = {"0": "Turdus merula", "1": "Acer rubrum", "2": "Corvus corax"}
IMAGES = {"2017": "train_val_images", "2018": "train_val2018", "2019": "train_val2019"}


def inaturalist(root: Path, year: str = "2018") -> Path:
    """One tree for both splits, told apart by annotation files; in 2017's the folders have the species' names.

    As the competition's README of each year tells, which says nothing of the order of 2017's ids.
    """
    number = 0
    splits: dict[str, dict[str, list[dict[str, Any]]]] = {}
    categories = [
        {"id": int(key), "name": SPECIES[key], "supercategory": group}
        for group, keys in TREE.items()
        for key in keys
    ]
    for split, count in ((f"train{year}", 3), (f"val{year}", 2)):
        images, annotations = [], []
        for group, keys in TREE.items():
            for key in keys:
                folder = SPECIES[key] if year == "2017" else key
                for _ in range(count):
                    number += 1
                    name = f"{IMAGES[year]}/{group}/{folder}/{number:032x}.jpg"
                    jpeg(root / name, number)
                    images.append({"id": number, "file_name": name, "width": 40, "height": 30})
                    annotations.append({"id": number, "image_id": number, "category_id": int(key)})
        splits[split] = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps({"info": {}, "licenses": [], **splits[split]}))
    return root


SPLITS = {"train_split": "train2018", "test_split": "val2018"}


@pytest.mark.parametrize("year", IMAGES)
def test_inaturalist_by_its_annotation_files_is_torchvisions(year: str, tmp_path: Path) -> None:
    root = inaturalist(tmp_path / "inat", year)
    classes, found = read(root, train_split=f"train{year}", test_split=f"val{year}")
    assert classes == ["0 Turdus merula", "1 Acer rubrum", "2 Corvus corax"]
    assert [len(found[split]) for split in ("train", "test")] == [9, 6]
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / year).symlink_to(root / IMAGES[year])
    theirs = INaturalist(str(tmp_path / "torchvision"), version=year)
    # torchvision numbers 2017's classes in the order of their folders: they are compared by name.
    named = [Path(folder).name for folder in theirs.all_categories]
    label = {name: int(name) if year != "2017" else [*SPECIES.values()].index(name) for name in named}
    expected = {file: label[named[number]] for number, file in theirs.index}
    ours = {}
    for split in found.values():
        assert isinstance(split.images, FilePixels)
        entries = split.images.entries(np.arange(len(split)))
        for entry, number in zip(entries, split.labels.tolist(), strict=True):
            ours[Path(entry.path).name] = number
    assert ours == expected


def test_a_tree_of_groups_is_read_by_its_innermost_folders(tmp_path: Path) -> None:
    """The whole of 2018 or 2019 as one split; of 2017, where these folders have the species' names, too."""
    root = inaturalist(tmp_path / "inat")
    classes, labels, files = image_files.index(root / "train_val2018", classes=None, progress="index")
    assert classes == ["0", "1", "2"]
    assert np.bincount(labels).tolist() == [5, 5, 5]
    assert all(name.split("/")[1] == classes[label] for name, label in zip(files.names, labels, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no JSON", "is no annotation file"),
        ("no categories", "is no annotation file with images, annotations and categories: KeyError"),
        ("two classes", "gives an image several classes"),
        ("no class", "gives 1 images no class: train_val2018/"),
        ("no file", "cannot be read: No such file"),
        ("another category", "has 1 class folders that the training images lack: 7 new"),
    ],
)
def test_an_annotation_file_that_cannot_be_used(change: str, message: str, tmp_path: Path) -> None:
    root = inaturalist(tmp_path)
    path = root / "val2018.json"
    content = json.loads(path.read_text())
    match change:
        case "no JSON":
            path.write_text("{")
        case "no categories":
            del content["categories"]
        case "two classes":
            content["annotations"].append({"id": 99, "image_id": 10, "category_id": 1})
        case "no class":
            del content["annotations"][0]
        case "no file":
            (root / content["images"][0]["file_name"]).unlink()
        case _:
            content["categories"].append({"id": 7, "name": "new"})
    if change != "no JSON":
        path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match=message):
        read(root, **SPLITS)


# COCO


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    """COCO's train2017: to pre-train on, and no task."""
    for number in range(5):
        jpeg(tmp_path / "train2017" / f"{number:012d}.jpg", number)
    _, _, files = image_files.index(tmp_path / "train2017", classes=None, progress="index", labelled=False)
    assert files.names == [f"{number:012d}.jpg" for number in range(5)]
    assert FilePixels(files, np.arange(5), Shape(3, 28, 24))[:].shape == (5, 3, 24, 24)
    assert image_files.count(tmp_path / "train2017") == 5
    with pytest.raises(StudyError, match=r"holds an image in no class folder: 000000000000.jpg"):
        read(tmp_path, train_split="train2017", test_split="val2017")


def test_a_flat_folder_is_described_as_the_task_images_would_be(tmp_path: Path) -> None:
    for number in range(6):
        jpeg(tmp_path / "coco" / f"{number:012d}.jpg", number)
        jpeg(tmp_path / "task" / "class" / f"{number:012d}.jpg", number)
    shape = Shape(3, 28, 24)
    found = pretraining_images.in_files(tmp_path / "coco", shape)
    _, labels, files = image_files.index(tmp_path / "task", classes=None, progress="index")
    task = images.ImageSet(FilePixels(files, np.arange(6), shape), labels)
    saved = images.save(tmp_path / "data", "files", ["class"], {"train": task})
    assert (found.description.mean, found.description.std) == (saved.mean, saved.std)
    np.testing.assert_array_equal(found.pixels[:], task.images[:])
    jpeg(tmp_path / "coco" / "000000000003.jpg", 9)
    assert pretraining_images.in_files(tmp_path / "coco", shape).description.fingerprint != (
        found.description.fingerprint
    )
    with pytest.raises(StudyError, match="is not there"):
        pretraining_images.in_files(tmp_path / "nowhere", shape)
