"""Where the images come from: Fashion-MNIST in three ways, folders through timm, and the stage that stores them."""

from __future__ import annotations

from attention_transfer.stage import Stage

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import IterableDataset
from torchvision import datasets as torchvision_datasets

from attention_transfer import config
from attention_transfer.config import Data
from attention_transfer.data import images, shifts, sources
from attention_transfer.data.images import ImageSet
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout

ROOT = Path(__file__).parents[1]
TRAIN_IMAGES = "train-images-idx3-ubyte"


def data(folder: Path, **changes: Any) -> Data:
    values: dict[str, Any] = {
        "source": "fashion-mnist",
        "folder": str(folder),
        "train_split": "train",
        "test_split": "test",
        "image_size": 28,
        "channels": 1,
        "labelled": 10,
        "validation": 10,
        "seed": 0,
    }
    values |= changes
    return Data(**{"resize": values["image_size"], **values})


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    """The IDX format of the MNIST family: type and number of dimensions, their sizes, then the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """A Fashion-MNIST of 7 and 5 images; no package and no download unless a test brings them."""
    random = np.random.default_rng(0)
    made = {}
    for prefix, count in (("train", 7), ("t10k", 5)):
        made[f"{prefix}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28)))
        made[f"{prefix}-labels-idx1-ubyte"] = idx(random.integers(0, 10, count))
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}
    monkeypatch.setattr(sources, "FASHION_MNIST", hashes)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def offline(root: str, *, download: bool) -> None:
        raise RuntimeError("no connection")

    monkeypatch.setattr(torchvision_datasets, "FashionMNIST", offline)
    return made


def put(folder: Path, contents: dict[str, bytes], *, compressed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def install(tmp_path: Path, folder: Path) -> None:
    """A `dpkg` that lists the files of a folder as those of Debian's package."""
    script = tmp_path / "bin" / "dpkg"
    lines = "\n".join(f"echo '{path}'" for path in [folder, *sorted(folder.iterdir())])
    script.write_text(f'#!/bin/sh\n[ "$1 $2" = "-L {sources.DEBIAN_PACKAGE}" ] || exit 1\n{lines}\n')
    script.chmod(0o755)


def check(folder: Path, contents: dict[str, bytes]) -> None:
    classes, splits = sources.read(data(folder))
    assert len(classes) == 10
    for split, prefix, count in (("train", "train", 7), ("test", "t10k", 5)):
        assert splits[split].images.shape == (count, 1, 28, 28)
        assert splits[split].images.dtype == np.uint8
        assert splits[split].labels.dtype == np.int64
        assert splits[split].images.tobytes() == contents[f"{prefix}-images-idx3-ubyte"][16:]
        assert bytes(splits[split].labels.astype(np.uint8)) == contents[f"{prefix}-labels-idx1-ubyte"][8:]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_files_in_the_folder(
    compressed: bool, below: str, contents: dict[str, bytes], tmp_path: Path
) -> None:
    put(tmp_path / "data" / below, contents, compressed=compressed)
    check(tmp_path / "data", contents)


@pytest.mark.parametrize("compressed", [True, False])
def test_debians_package(compressed: bool, contents: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "share", contents, compressed=compressed)
    install(tmp_path, tmp_path / "share")
    check(tmp_path / "data", contents)
    assert not (tmp_path / "data").exists()


def test_the_folder_comes_before_the_package(contents: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "share", dict.fromkeys(contents, b"another"), compressed=True)
    install(tmp_path, tmp_path / "share")
    put(tmp_path / "data", contents, compressed=True)
    check(tmp_path / "data", contents)


def test_the_package_comes_before_the_download(
    contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(root: str, *, download: bool) -> None:
        raise AssertionError("a download although the package is there")

    monkeypatch.setattr(torchvision_datasets, "FashionMNIST", fails)
    put(tmp_path / "share", contents, compressed=True)
    install(tmp_path, tmp_path / "share")
    check(tmp_path / "data", contents)


def test_the_download_comes_last_and_once(
    contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def downloads(root: str, *, download: bool) -> None:
        calls.append(download)
        put(Path(root) / "FashionMNIST" / "raw", contents, compressed=True)

    monkeypatch.setattr(torchvision_datasets, "FashionMNIST", downloads)
    (tmp_path / "empty").mkdir()
    install(tmp_path, tmp_path / "empty")  # dpkg is there, the package holds none of the files
    check(tmp_path / "data", contents)
    assert calls == [True]


def test_a_part_of_the_files_is_completed(contents: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "share", contents, compressed=True)
    install(tmp_path, tmp_path / "share")
    put(tmp_path / "data", {TRAIN_IMAGES: contents[TRAIN_IMAGES]}, compressed=False)
    check(tmp_path / "data", contents)


@pytest.mark.usefixtures("contents")
def test_without_files_the_message_names_all_three_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StudyError) as caught:
        sources.read(data(tmp_path / "data"))
    assert TRAIN_IMAGES in caught.value.problem
    for way in (str(tmp_path / "data"), f"apt-get install {sources.DEBIAN_PACKAGE}", "internet"):
        assert way in caught.value.remedy
    assert "no connection" in capsys.readouterr().out


def damages(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "a bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "a bit of the header": bytes([content[0] ^ 1]) + content[1:],
        "cut": content[:middle],
        "a byte less": content[:-1],
        "a byte more": content + b"\0",
        "empty": b"",
    }


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("damage", list(damages(b"abcd")))
@pytest.mark.parametrize("name", [TRAIN_IMAGES, "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_is_named(
    name: str, damage: str, compressed: bool, contents: dict[str, bytes], tmp_path: Path
) -> None:
    put(tmp_path, contents, compressed=compressed)
    path = tmp_path / f"{name}{'.gz' * compressed}"
    path.write_bytes(damages(path.read_bytes())[damage])
    if compressed and damage == "a byte more":  # gzip ignores zeros at the end: the content is whole
        check(tmp_path, contents)
        return
    with pytest.raises(StudyError, match=r"is damaged|cannot be read") as caught:
        sources.read(data(tmp_path))
    assert caught.value.where == str(path)
    assert "delete this file" in caught.value.remedy


def test_other_sizes_and_channels(contents: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path, contents, compressed=False)
    plain = sources.read(data(tmp_path))[1]["train"]
    coloured = sources.read(data(tmp_path, channels=3, image_size=14))[1]["train"]
    assert coloured.images.shape == (7, 3, 14, 14)
    assert (coloured.images == coloured.images[:, :1]).all()
    assert np.array_equal(coloured.labels, plain.labels)
    # Half the size with a smoothing filter keeps the mean.
    first, second = (part.images.mean(axis=(1, 2, 3)) for part in (plain, coloured))
    np.testing.assert_allclose(first, second, atol=2)


def test_digits_are_split_once_for_all_studies(tmp_path: Path) -> None:
    names, splits = sources.read(data(tmp_path, source="digits"))
    assert names == [*"0123456789"]
    assert {split: len(part) for split, part in splits.items()} == {"train": 1437, "test": 360}
    again = sources.read(data(tmp_path, source="digits", seed=1))[1]
    bunch = load_digits()
    rows = []
    for split, part in splits.items():
        assert part.images.shape[1:] == (1, 28, 28)
        assert np.array_equal(part.images, again[split].images)
        shares = np.bincount(part.labels) / len(part)
        np.testing.assert_allclose(shares, np.bincount(bunch.target) / len(bunch.target), atol=2 / 360)
        rows += [
            (image.tobytes(), label) for image, label in zip(part.images, part.labels.tolist(), strict=True)
        ]
    every, labels = shifts.digits(28, 1)
    assert sorted(rows) == sorted(
        (image.tobytes(), label) for image, label in zip(every, labels.tolist(), strict=True)
    )


def test_a_built_in_data_set_has_splits_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="those of digits are called train and test"):
        data(tmp_path, source="digits", test_split="validation")


# Folders of images, through timm

CLASSES = ["bird", "cat", "dog"]


def picture(level: int, shape: tuple[int, int], mode: str) -> Image.Image:
    """A plain picture of one grey level with a brighter left half."""
    array = np.full(shape, level, np.uint8)
    array[:, : shape[1] // 2] += 40
    return Image.fromarray(array).convert(mode)


def folder_of_pictures(root: Path, counts: dict[str, int], classes: list[str] = CLASSES) -> None:
    for split, count in counts.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                shape = [(24, 36), (40, 20), (24, 24)][index % 3]
                level = 20 + 60 * label + (split == "test")
                image = picture(level, shape, "RGB" if index % 2 else "L")
                image.save(root / split / name / f"{index:02d}.jpg", quality=95)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder_of_pictures(tmp_path / "pictures", {"train": 4, "test": 2})
    return tmp_path / "pictures"


def from_folder(folder: Path, **changes: Any) -> Data:
    return data(folder, **{"source": "folder", "image_size": 20, "channels": 3, **changes})


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_jpegs(channels: int, pictures: Path) -> None:
    classes, splits = sources.read(from_folder(pictures, channels=channels))
    assert classes == CLASSES
    for split, count in (("train", 4), ("test", 2)):
        part = splits[split]
        assert part.images.shape == (3 * count, channels, 20, 20)
        assert part.images.dtype == np.uint8
        assert list(part.labels) == list(np.repeat([0, 1, 2], count))
        # Each image is the one of its label: centre-cropped, so both halves have the same share.
        expected = 20 + 60 * part.labels + (split == "test") + 20
        np.testing.assert_allclose(part.images.mean(axis=(1, 2, 3)), expected, atol=4)
        assert (
            part.images[..., :5].mean(axis=(1, 2, 3)) > part.images[..., -5:].mean(axis=(1, 2, 3)) + 30
        ).all()


def test_torchvisions_folder_gives_the_same(pictures: Path) -> None:
    classes, splits = sources.read(from_folder(pictures))
    others, other_splits = sources.read(from_folder(pictures, source="torch/folder"))
    assert classes == others
    for split in ("train", "test"):
        assert np.array_equal(splits[split].labels, other_splits[split].labels)
        assert np.array_equal(splits[split].images, other_splits[split].images)


@pytest.mark.parametrize("damage", ["cut", "no image", "empty"])
@pytest.mark.parametrize("source", ["folder", "torch/folder"])
def test_a_broken_jpeg_is_named(damage: str, source: str, pictures: Path) -> None:
    """timm itself would put the next image, with its label, in place of the broken one."""
    path = pictures / "train" / "cat" / "01.jpg"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "no image": b"<html>" * 99, "empty": b""}[damage])
    with pytest.raises(StudyError, match="cannot be decoded") as caught:
        sources.read(from_folder(pictures, source=source))
    # torchvision's data sets know no names: there the number must do.
    assert ("cat/01.jpg" if source == "folder" else "image 5 ") in caught.value.problem
    assert str(pictures) in caught.value.where


def test_splits_of_different_classes_are_refused(pictures: Path) -> None:
    (pictures / "test" / "dog").rename(pictures / "test" / "wolf")
    with pytest.raises(StudyError, match=r"different classes: \['dog', 'wolf'\]"):
        sources.read(from_folder(pictures))


@pytest.mark.parametrize(
    "changes", [{"train_split": "trian"}, {"test_split": "validation"}, {"test_split": "val"}]
)
def test_a_split_without_a_folder_is_refused(changes: dict[str, str], pictures: Path) -> None:
    """timm itself would silently take all images of all splits."""
    with pytest.raises(StudyError, match="has no folder") as caught:
        sources.read(from_folder(pictures, **changes))
    assert next(iter(changes.values())) in caught.value.problem
    assert "data.train_split" in caught.value.remedy


def test_splits_of_the_same_images_are_refused(pictures: Path) -> None:
    """torchvision's folder falls back as well: two unknown names give the same images twice."""
    with pytest.raises(StudyError, match="hold the same images"):
        sources.read(from_folder(pictures, source="torch/folder", train_split="a", test_split="b"))


def test_an_empty_folder_is_refused(pictures: Path) -> None:
    shutil.rmtree(pictures / "test")
    (pictures / "test").mkdir()
    with pytest.raises(StudyError, match="Found 0 images"):
        sources.read(from_folder(pictures))


def test_an_unknown_source_is_refused(pictures: Path) -> None:
    with pytest.raises(StudyError, match="torch/no_such_set"):
        sources.read(from_folder(pictures, source="torch/no_such_set"))


def test_an_iterable_data_set_is_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    monkeypatch.setattr(timm.data, "create_dataset", lambda *names, **options: Stream())
    with pytest.raises(StudyError, match="is an iterable data set") as caught:
        sources.read(from_folder(pictures, source="wds/any"))
    assert "map-style" in caught.value.remedy


# The stage, and the arrays on disk


def run_stage(params: Path) -> None:
    """pipeline/data.py, in this process."""
    script = ROOT / "pipeline" / "data.py"
    specification = importlib.util.spec_from_file_location("stage_data", script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    study = config.load(params)
    module.main(Stage("data", {}, study, params, script, Layout(study.name)))


def test_the_stage_writes_arrays_and_their_description(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "presets" / "smoke.yaml").read_text()
    for old, new in (
        ("source: fashion-mnist", "source: folder"),
        ("folder: data/fashion-mnist", f"folder: {pictures}"),
        ("image_size: 28", "image_size: 21"),
        ("channels: 1", "channels: 3"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    Path("params.yaml").write_text(text)
    run_stage(Path("params.yaml"))
    folder = Path("runs/smoke/data")
    assert sorted(os.listdir(folder)) == [  # noqa: PTH208
        "dataset.json",
        "test_images.npy",
        "test_labels.npy",
        "train_images.npy",
        "train_labels.npy",
    ]
    described = json.loads((folder / "dataset.json").read_text())
    train, test = images.load(folder, "train"), images.load(folder, "test")
    assert described["classes"] == CLASSES
    assert described["source"] == "folder"
    assert (len(train), len(test)) == (12, 6)
    np.testing.assert_allclose(described["mean"], train.images.mean(axis=(0, 2, 3)) / 255, atol=1e-6)
    np.testing.assert_allclose(described["std"], train.images.std(axis=(0, 2, 3)) / 255, atol=1e-6)
    record = json.loads(Path("metrics/smoke/data/run.json").read_text())
    assert record["params"]["data"]["folder"] == str(pictures)
    metrics = json.loads(Path("metrics/smoke/data/metrics.json").read_text())
    assert metrics == {"classes": 3, "test_images": 6, "train_images": 12}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    splits = {
        split: ImageSet(random.integers(0, 256, (9, 1, 4, 4), dtype=np.uint8), random.integers(0, 3, 9))
        for split in ("train", "test")
    }
    images.save(tmp_path, "made", CLASSES, splits)
    return tmp_path


FLIPS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "truncated": lambda whole: (whole[:length] for length in range(0, len(whole), 3)),
    "with a bit flipped": lambda whole: (
        whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
        for at in range(len(whole))
        for bit in range(at % 4, 8, 4)
    ),
}


@pytest.mark.parametrize("damage", list(FLIPS))
@pytest.mark.parametrize("file", ["train_images.npy", "train_labels.npy"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, of a dtype that a flip has named
def test_every_damage_of_an_array_is_seen(file: str, damage: str, stored: Path) -> None:
    """A quarter of all bit flips: each gives a StudyError, or the very array that was stored."""
    path, before = stored / file, images.load(stored, "train")
    for content in FLIPS[damage](path.read_bytes()):
        path.write_bytes(content)
        error = None
        try:
            after = images.load(stored, "train")
        except StudyError as caught:
            error = caught
        if error is not None:
            assert error.where == str(path)
            assert "python -m attention_transfer remake data" in error.remedy
        else:  # a flip in the header that means the same, such as byte order `=` for `<`
            assert np.array_equal(after.images, before.images)
            assert np.array_equal(after.labels, before.labels)
            assert damage == "with a bit flipped"


@pytest.mark.parametrize("file", ["train_images.npy", "train_labels.npy", "dataset.json"])
def test_a_missing_file_is_named(file: str, stored: Path) -> None:
    (stored / file).unlink()
    with pytest.raises(StudyError) as caught:
        images.load(stored, "train")
    assert caught.value.where == str(stored / file)
    assert "data" in caught.value.remedy


def test_arrays_that_changed_places_are_refused(stored: Path) -> None:
    shutil.copy(stored / "test_images.npy", stored / "train_images.npy")
    with pytest.raises(StudyError, match="checksum is not the recorded one"):
        images.load(stored, "train")


@pytest.mark.parametrize("content", ["{", "[]", '{"source": "a"}', '{"colour": 1}'])
def test_a_damaged_description_is_refused(content: str, stored: Path) -> None:
    (stored / "dataset.json").write_text(content)
    with pytest.raises(StudyError, match="is damaged") as caught:
        images.load(stored, "train")
    assert caught.value.where == str(stored / "dataset.json")


def test_an_edited_value_of_the_description_is_refused(stored: Path) -> None:
    path = stored / "dataset.json"
    whole = path.read_text()
    digits = [at for at, character in enumerate(whole) if character.isdecimal()]
    for at in digits:
        path.write_text(f"{whole[:at]}{(int(whole[at]) + 1) % 10}{whole[at + 1 :]}")
        with pytest.raises(StudyError, match="is damaged") as caught:
            images.describe(stored)
        assert caught.value.where == str(path)


def test_the_fingerprint_is_that_of_the_arrays(stored: Path, tmp_path: Path) -> None:
    train, test = images.load(stored, "train"), images.load(stored, "test")
    first = images.describe(stored).fingerprint
    again = images.save(tmp_path / "again", "made", CLASSES, {"train": train, "test": test})
    assert again.fingerprint == first
    swapped = images.save(tmp_path / "swapped", "made", CLASSES, {"train": test, "test": train})
    assert swapped.fingerprint != first
