"""Images that stay in their files: indexed, checked, decoded and augmented one by one by Pillow in other processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from attention_transfer.config import Data
from attention_transfer.data import decoding, image_files, images, rendering, sources, views, workers
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Shape
from attention_transfer.data.images import ImageSet
from attention_transfer.data.views import ViewRecipe
from attention_transfer.errors import StudyError

SIDES = [(64, 48), (31, 97), (40, 40), (200, 33), (24, 24)]
CLASSES = ["cat", "dog"]


@dataclass(frozen=True)
class Params:
    """The part of params.yaml's views that a recipe reads."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    erase: float = 0.0
    erase_with: Literal["mean", "noise"] = "mean"
    rand_augment: str | None = None


def recipe(params: Params = Params(), channels: int = 3) -> ViewRecipe:
    return ViewRecipe.of(params, dataset="d", seed=0, mean=[0.5] * channels, std=[0.25] * channels)


def picture(sides: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth, so that JPEG keeps it, and other to the left than to the right."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(sides, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for split, count in (("train", 5), ("test", 3)):
        for label, name in enumerate(CLASSES):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                sides = SIDES[(number + label) % len(SIDES)]
                picture(sides, seed=100 * label + number).save(place / f"{split}{number}.JPEG", quality=90)
    return root


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has; the pool is started once for all tests."""
    monkeypatch.setenv(workers.WORKERS, "2")


def data(folder: Path, **changes: Any) -> Data:
    values: dict[str, Any] = {
        "source": "files",
        "folder": str(folder),
        "train_split": "train",
        "test_split": "test",
        "resize": 28,
        "image_size": 24,
        "channels": 3,
        "labelled": 4,
        "validation": 2,
        "seed": 0,
    }
    return Data(**values | changes)


def read(folder: Path, **changes: Any) -> dict[str, ImageSet]:
    return sources.read(data(folder, **changes))[1]


# Clean images


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("resize", "size"), [(28, 24), (24, 24), (33, 20)])
def test_clean_images_are_torchvisions(sides: tuple[int, int], resize: int, size: int) -> None:
    expected = transforms.Compose(
        [transforms.Resize(resize, InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    )(picture(sides))
    found = decoding.clean(picture(sides), Shape(3, resize, size))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_array_of_a_folder_is_its_decoded_images(channels: int, folder: Path, two_workers: None) -> None:
    sets = read(folder, channels=channels)
    for split, count in (("train", 5), ("test", 3)):
        pixels, labels = sets[split].images, sets[split].labels
        assert pixels.shape == (2 * count, channels, 24, 24)
        assert labels.tolist() == [0] * count + [1] * count
        paths = sorted((folder / split).rglob("*.JPEG"))
        mode = "L" if channels == 1 else "RGB"
        shape = transforms.Compose(
            [transforms.Resize(28, InterpolationMode.BICUBIC), transforms.CenterCrop(24)]
        )
        expected = [np.asarray(shape(Image.open(path).convert(mode))).reshape(24, 24, -1) for path in paths]
        np.testing.assert_array_equal(pixels[np.arange(len(paths))].transpose(0, 2, 3, 1), np.stack(expected))


def test_rows_are_chosen_as_in_an_array(folder: Path, two_workers: None) -> None:
    pixels = read(folder)["train"].images
    assert isinstance(pixels, FilePixels)
    everything = pixels[:]
    chosen = np.array([7, 0, 7, 3])
    np.testing.assert_array_equal(pixels[chosen], everything[chosen])
    np.testing.assert_array_equal(pixels[2:9:3], everything[2:9:3])
    np.testing.assert_array_equal(pixels[4], everything[4])
    np.testing.assert_array_equal(pixels.take(chosen)[1:3], everything[chosen][1:3])
    assert len(pixels.take(chosen)) == 4


@pytest.mark.parametrize("kind", ["CMYK", "palette", "grey", "alpha"])
def test_images_of_other_kinds_are_converted(kind: str, tmp_path: Path) -> None:
    """ImageNet has some of each, with the ending of a JPEG."""
    image = picture((40, 30))
    for split in ("train", "test"):
        place = tmp_path / split / "cat"
        place.mkdir(parents=True)
        path = place / "a.JPEG"
        match kind:
            case "CMYK":
                image.convert("CMYK").save(path, quality=95)
            case "palette":
                image.quantize(256).save(path, format="PNG")
            case "grey":
                image.convert("L").save(path, quality=95)
            case _:
                image.convert("RGBA").save(path, format="PNG")
    found = np.empty((1, 3, 30, 30), np.uint8)
    entries = list(read(tmp_path)["train"].images.entries(np.arange(1)))
    decoding.render(entries, Shape(3, 30, 30), None, np.arange(1), 0, pixels=found)
    left = (image.width - image.height) // 2
    expected = np.asarray(image.convert("L").convert("RGB") if kind == "grey" else image, dtype=float)[
        :, left : left + 30
    ]
    assert abs(found[0].transpose(1, 2, 0) - expected).mean() < 12


# Views


@pytest.mark.parametrize("sides", [(500, 375), (120, 400), (64, 64)])
def test_crops_are_distributed_as_torchvisions(sides: tuple[int, int]) -> None:
    """Widths, heights and places of 4,000 crops, by Kolmogorov and Smirnov, against torchvision's."""
    the = recipe(Params(crop_scale=(0.08, 1.0)))
    drawn = views.uniforms(the.key, np.arange(4000), 0, 25, skip=16).tolist()
    ours = np.array([decoding.crop_box(sides, the, numbers) for numbers in drawn])
    left, top, right, bottom = ours.T
    assert min(left.min(), top.min()) >= 0
    assert (right.max(), bottom.max()) <= sides
    blank = torch.empty(3, sides[1], sides[0])
    torch.manual_seed(0)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    for mine, other in zip((top, left, bottom - top, right - left), theirs.T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-4


def test_a_crop_that_never_fits_is_the_largest_central_one() -> None:
    the = recipe(Params(crop_scale=(1.0, 1.0)))
    numbers = [0.5] * 25
    assert decoding.crop_box((100, 10), the, numbers) == (43, 0, 56, 10)  # 4 / 3 wide
    assert decoding.crop_box((10, 100), the, numbers) == (0, 43, 10, 56)


def test_a_view_is_the_crop_resized_by_pillow() -> None:
    the = recipe(Params(flip=1.0))
    image = picture((90, 70))
    numbers = views.uniforms(the.key, np.array([3]), 2, 25, skip=16)[0].tolist()
    box = decoding.crop_box(image.size, the, numbers)
    expected = image.crop(box)
    mirrored = decoding.crop_and_flip(image, the, 24, numbers).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Cutting first forgets the pixels beyond the border, which bicubic weights reach: equal but for the edge.
    inner = (slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(
        np.asarray(mirrored, float)[inner],
        np.asarray(expected.resize((24, 24), Image.Resampling.BICUBIC), float)[inner],
        atol=3,
    )


POLICY = "rand-m9-mstd0.5-inc1"


def test_rand_augment_is_timms_under_the_seed_of_the_view() -> None:
    the, shape, image = recipe(Params(rand_augment=POLICY)), Shape(3, 24, 24), picture((24, 24))
    settings = {"translate_const": 10, "img_mean": (128,) * 3, "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform(POLICY, settings)
    differ = 0
    for view in range(20):
        drawn = views.uniforms(the.key, np.array([5]), view, 25, skip=16)[0].tolist()[-2:]
        found = decoding.augmented(image, the, shape, drawn)
        seed = (int(drawn[0] * 2**24) << 24) | int(drawn[1] * 2**24)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        np.testing.assert_array_equal(np.asarray(found), np.asarray(theirs(image)))
        differ += not np.array_equal(np.asarray(found), np.asarray(image))
    assert differ > 15


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["files", "array"])
def test_a_view_depends_on_image_and_number_alone(
    kind: str, channels: int, folder: Path, two_workers: None
) -> None:
    """To the bit: alone, in company, in this process or in others."""
    the = recipe(Params(rand_augment=POLICY, erase=0.5, erase_with="noise"), channels)
    pixels = read(folder, channels=channels)["train"].images
    assert isinstance(pixels, FilePixels)
    shown: np.ndarray | FilePixels = pixels[:] if kind == "array" else pixels
    examples = np.arange(len(pixels)) * 3
    render = rendering.views_of(the, shown, examples)
    together = render(np.arange(10), 7)
    assert together.shape == (10, channels, 24, 24)
    for rows in ([3], [9, 0, 3], list(range(9, -1, -1))):
        assert torch.equal(render(np.array(rows), 7), together[rows])
    assert not torch.equal(render(np.arange(10), 8), together)
    entries = pixels.entries(np.arange(10)) if kind == "files" else list(pixels[:])
    size = Shape(channels, 28, 24) if kind == "files" else Shape(channels, 24, 24)
    alone = np.empty((10, channels, 24, 24), np.uint8)
    decoding.render(entries, size, the, examples, 7, pixels=alone)
    assert torch.equal(views.erase(the, views.normalise(the, alone), examples, 7), together)
    # Begun before, in another order, and more than are kept: the same.
    for view in (9, 7, 8, 7):
        render.begin(np.arange(10), view)
    assert torch.equal(render(np.arange(10), 7), together)


def test_images_themselves_are_the_decoded_ones_normalised(
    folder: Path, two_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files and of an array, begun ahead or not; a recipe's cropping, policy and erasing do not touch them."""
    the = recipe(Params(rand_augment=POLICY, erase=1.0), 3)
    pixels = read(folder, channels=3)["train"].images
    assert isinstance(pixels, FilePixels)
    expected = views.normalise(the, pixels[:])
    both, started, begin = (pixels, pixels[:]), [], workers.begin
    monkeypatch.setattr(workers, "begin", lambda *work: started.append(work) or begin(*work))
    for shown in both:
        clean = rendering.clean_images(the, shown, torch.device("cpu"))
        rows = np.array([4, 0, 9])
        assert torch.equal(clean(rows), expected[rows])
        clean.begin(rows)
        clean.begin(np.array([1, 2]))
        # Processes are at files already, and are not asked again; arrays need none.
        assert len(started) == 3
        assert torch.equal(clean(rows), expected[rows])
        assert torch.equal(clean(np.array([1, 2])), expected[[1, 2]])
        assert len(started) == 3


def test_the_largest_magnitude_of_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Posterize then keeps no bits, which Pillow alone refuses: the image is black."""
    policy, image = decoding.rand_augment("rand-m10-p1.0-inc1", (0.5,) * 3, 24), picture((24, 24))
    black = []
    for operation in policy.ops:  # type: ignore[attr-defined]
        monkeypatch.setattr(operation, "prob", 1.0)
        if not np.asarray(operation(image)).any():
            black.append(operation.name)
    assert black == ["PosterizeIncreasing"]


def test_a_policy_that_timm_does_not_know() -> None:
    with pytest.raises(ValueError, match="timm does not know the policy 'rand-z9'"):
        decoding.rand_augment("rand-z9", (0.5,), 24)


# Erasing with noise


def test_noise_is_normal_and_within_the_rectangle() -> None:
    by_mean, by_noise = (recipe(Params(erase=1.0, erase_with=fill)) for fill in ("mean", "noise"))
    pixels, examples = torch.full((300, 3, 16, 16), 9.0), np.arange(300)
    erased = views.erase(by_mean, pixels.clone(), examples, 4) == 0
    noisy = views.erase(by_noise, pixels.clone(), examples, 4)
    assert torch.equal(noisy != 9, erased)
    values = noisy[erased].double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert len(np.unique(values)) > 0.99 * len(values)
    alone = views.erase(by_noise, pixels[[17]], examples[[17]], 4)
    assert torch.equal(alone, noisy[[17]])
    assert not torch.equal(views.erase(by_noise, pixels.clone(), examples, 5), noisy)


def test_a_recipe_without_the_newer_keys_is_recorded_as_before() -> None:
    assert set(recipe().record()) == {"key", "mean", "std", "crop_scale", "crop_ratio", "flip", "erase"}
    more = recipe(Params(rand_augment=POLICY, erase_with="noise")).record()
    assert (more["rand_augment"], more["erase_with"]) == (POLICY, "noise")


# The index


def packed(folder: Path) -> Path:
    """The same images as tars, in another order."""
    target = folder.parent / "packed"
    target.mkdir()
    for split in ("train", "test"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            for path in sorted((folder / split).rglob("*.JPEG"), reverse=True):
                tar.add(path, arcname=str(path.relative_to(folder / split)))
    return target


def test_a_tar_is_the_folder(folder: Path, tmp_path: Path, two_workers: None) -> None:
    loose, tars = read(folder), read(packed(folder))
    for split in ("train", "test"):
        np.testing.assert_array_equal(loose[split].images[:], tars[split].images[:])
    described = [
        images.save(tmp_path / name, "files", CLASSES, sets) for name, sets in (("a", loose), ("b", tars))
    ]
    assert described[0] == described[1]
    again = images.load(tmp_path / "b", "test")
    np.testing.assert_array_equal(again.images[:], loose["test"].images[:])
    np.testing.assert_array_equal(again.labels, loose["test"].labels)


def test_mean_and_deviation_are_those_of_the_decoded_images(folder: Path, two_workers: None) -> None:
    pixels = read(folder)["train"].images
    assert isinstance(pixels, FilePixels)
    whole = pixels[:].astype(np.float64) / 255
    mean, std = images.statistics(pixels)
    np.testing.assert_allclose(mean, whole.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, whole.std(axis=(0, 2, 3)), rtol=1e-10)


@pytest.mark.parametrize("change", ["other bytes", "cut", "gone"])
@pytest.mark.parametrize("place", ["folder", "tar"])
def test_a_file_that_changes_after_indexing_is_named(
    change: str, place: str, folder: Path, two_workers: None
) -> None:
    root = folder if place == "folder" else packed(folder)
    pixels = read(root)["train"].images
    assert isinstance(pixels, FilePixels)
    entry = pixels.entries(np.array([3]))[0]
    path = Path(entry.path)
    content = bytearray(path.read_bytes())
    start = max(entry.offset, 0)
    match change:
        case "other bytes":
            content[start + entry.size // 2] ^= 1
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: start + entry.size // 2])
        case _:
            path.unlink()
    with pytest.raises(StudyError, match=r"cannot be read|is not what was indexed") as caught:
        pixels[np.arange(10)]
    assert entry.name in caught.value.where or place == "tar"
    assert str(root) in caught.value.where


def test_a_broken_image_is_named(folder: Path, two_workers: None) -> None:
    """Its header is whole, so that only decoding finds it."""
    path = folder / "train" / "dog" / "train1.JPEG"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StudyError, match="cannot be decoded") as caught:
        read(folder)["train"].images[:]
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("no image", "is no image that can be read"),
        ("another class", r"has 1 class folders that the training images lack: wolf"),
        ("empty", "holds no images"),
        ("missing", "has neither a folder 'test' nor a file test.tar"),
        ("compressed", "is no whole, uncompressed tar"),
    ],
)
def test_a_folder_that_cannot_be_used(problem: str, message: str, folder: Path) -> None:
    test = folder / "test"
    match problem:
        case "no image":
            (test / "dog" / "test0.JPEG").write_bytes(b"<html>" * 9)
        case "another class":
            (test / "dog").rename(test / "wolf")
        case "empty":
            for path in test.rglob("*.JPEG"):
                path.unlink()
        case "missing":
            test.rename(folder / "elsewhere")
        case _:
            test.rename(folder / "elsewhere")
            with tarfile.open(folder / "test.tar", "w:gz") as tar:
                tar.add(folder / "elsewhere", arcname=".")
    with pytest.raises(StudyError, match=message):
        read(folder)


@pytest.mark.parametrize("damage", ["cut", "another index"])
def test_a_damaged_index_is_found(damage: str, folder: Path, tmp_path: Path, two_workers: None) -> None:
    images.save(tmp_path / "data", "files", CLASSES, read(folder))
    path = tmp_path / "data" / "train_files.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_bytes((tmp_path / "data" / "test_files.npz").read_bytes())
    with pytest.raises(StudyError, match=r"is damaged|cannot be read") as caught:
        images.load(tmp_path / "data", "train")
    assert caught.value.where == str(path)


# The processes


def test_a_killed_process_is_an_error_and_no_hang(
    folder: Path, two_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = read(folder)["train"].images
    workers._started.cache_clear()  # a pool of its own, since it will be broken
    pixels[np.arange(8)]
    pool = workers._started()
    for process in list(pool._processes.values()):
        os.kill(process.pid, signal.SIGKILL)

    def go_on() -> None:
        for _ in range(50):
            pixels[np.arange(8)]
            time.sleep(0.05)

    try:
        with pytest.raises(StudyError, match="a process that decodes images has been killed"):
            go_on()
    finally:
        workers._started.cache_clear()


def test_a_number_of_processes_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workers.WORKERS, "many")
    with pytest.raises(StudyError, match=f"environment variable {workers.WORKERS}"):
        workers.count()


def test_processes_end_with_the_one_that_asked(folder: Path) -> None:
    program = f"""
import numpy as np, os, sys, time
from attention_transfer.config import Data
from attention_transfer.data import sources, workers
def main():
    sets = sources.read(Data(**{data(folder).model_dump()!r}))[1]
    sets["train"].images[np.arange(8)]
    print(*[process.pid for process in workers._started()._processes.values()], flush=True)
    time.sleep(600)
if __name__ == "__main__":
    main()
"""
    script = folder / "asks.py"
    script.write_text(program)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, workers.WORKERS: "2"},
    ) as process:
        assert process.stdout is not None
        numbers = [int(word) for word in process.stdout.readline().split()]
        assert len(numbers) == 2
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(runs, numbers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, numbers))


def runs(number: int) -> bool:
    """Whether there is such a process; one that has ended and whose parent has not asked is none."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_index_of_a_moved_folder_is_the_same(folder: Path) -> None:
    _, _, before = image_files.index(folder / "train", classes=None, progress="index")
    moved = folder.rename(folder.with_name("elsewhere"))
    _, _, after = image_files.index(moved / "train", classes=None, progress="index")
    assert before.root != after.root
    shape = Shape(3, 24, 24)
    sums = [FilePixels(files, np.arange(len(files)), shape).checksum for files in (before, after)]
    assert sums[0] == sums[1]
    other = FilePixels(after, np.arange(len(after)), replace(shape, resize=28))
    assert other.checksum != sums[0]
