"""Where the images come from: Fashion-MNIST, scikit-learn's digits, files, or what timm.data.create_dataset opens."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from attention_transfer.config import Data
from attention_transfer.data import image_files
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Shape
from attention_transfer.data.images import ImageSet
from attention_transfer.errors import StudyError

# SHA-256 of the uncompressed content: Debian's package and the authors' files differ in compression only.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DEBIAN_PACKAGE = "dataset-fashion-mnist"
TEST_DIGITS = 360  # of 1,797, which come without a split; the same for every study


def read(data: Data) -> tuple[list[str], dict[str, ImageSet]]:
    """Class names and the splits `train` and `test`, resized as params.yaml says.

    Raises:
        StudyError: the images are missing or damaged, or the splits do not fit together.
    """
    if data.source == "fashion-mnist":
        return FASHION_MNIST_CLASSES, {
            split: _fit(_fashion_mnist(Path(data.folder), prefix), data)
            for split, prefix in (("train", "train"), ("test", "t10k"))
        }
    if data.source == "digits":
        return [str(digit) for digit in range(10)], _digits(data)
    if data.source == "files":
        return _in_files(data)
    sets = {"train": _from_timm(data, data.train_split), "test": _from_timm(data, data.test_split)}
    (names, train), (test_names, test) = sets["train"], sets["test"]
    if names != test_names:
        raise StudyError(
            f"its splits have different classes: {sorted(set(names) ^ set(test_names))[:5]}",
            where=f"data.source {data.source} in {data.folder}",
            remedy="give both splits the same class folders",
        )
    assert isinstance(train.images, np.ndarray)
    assert isinstance(test.images, np.ndarray)
    if np.array_equal(train.images, test.images):
        raise StudyError(
            f"its splits {data.train_split!r} and {data.test_split!r} hold the same images",
            where=f"data.source {data.source} in {data.folder}",
            remedy="correct data.train_split, data.test_split: timm takes a name it does not know for another",
        )
    return names, {"train": train, "test": test}


def _in_files(data: Data) -> tuple[list[str], dict[str, ImageSet]]:
    """Indexes both splits, in whichever of the layouts of `image_files.index`; the images stay there."""
    form = Shape(data.channels, data.resize, data.image_size)
    classes: list[str] | None = None
    sets = {}
    for name, split in (("train", data.train_split), ("test", data.test_split)):
        root = _split(Path(data.folder), split)
        if root is None:
            raise StudyError(
                f"has neither a folder {split!r} nor a file {split}.tar, {split}.json, {split}.parquet or "
                f"{split}-*.parquet with the images of this split",
                where=f"data.folder {data.folder}",
                remedy="name what is there in data.train_split and data.test_split",
            )
        classes, labels, files = image_files.index(root, classes=classes, progress=f"index {split}")
        sets[name] = ImageSet(FilePixels(files, np.arange(len(files)), form), labels)
    assert classes is not None
    return classes, sets


def _split(folder: Path, name: str) -> Path | None:
    """What holds a split's images: in a folder, a tar, an annotation file, or shards."""
    for ending in ("", ".tar", ".json", ".parquet"):
        if (path := folder / f"{name}{ending}").exists():
            return path
    return folder / f"{name}-*.parquet" if any(folder.glob(f"{name}-*.parquet")) else None


def _fashion_mnist(folder: Path, prefix: str) -> ImageSet:
    images = _verified(folder, f"{prefix}-images-idx3-ubyte")
    labels = _verified(folder, f"{prefix}-labels-idx1-ubyte")
    # IDX format: a header of 16 bytes (images) or 8 (labels), then unsigned bytes.
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return ImageSet(pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def _verified(folder: Path, name: str) -> bytes:
    path = _find(folder, name)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    if (found := hashlib.sha256(content).hexdigest()) != FASHION_MNIST[name]:
        raise _damaged(path, f"is damaged: SHA-256 of its content is {found}, not {FASHION_MNIST[name]}")
    return content


def _damaged(path: Path, problem: str) -> StudyError:
    return StudyError(problem, where=str(path), remedy="delete this file and run again: it is obtained anew")


def _find(folder: Path, name: str) -> Path:
    """The data folder, then Debian's package, then torchvision's download."""
    for found in (*_in_folder(folder, name), *_in_debian_package(name)):
        return found
    _download(folder)
    for found in _in_folder(folder, name):
        return found
    raise StudyError(
        f"Fashion-MNIST's file {name} is neither here nor in Debian's package, and could not be downloaded",
        where=str(folder),
        remedy=f"do one of three things: put the four *-ubyte.gz files into {folder}; or install Debian's "
        f"package (apt-get install {DEBIAN_PACKAGE}); or run again with a connection to the internet",
    )


def _in_folder(folder: Path, name: str) -> list[Path]:
    return [path for suffix in ("", ".gz") for path in sorted(folder.rglob(name + suffix)) if path.is_file()]


def _in_debian_package(name: str) -> list[Path]:
    if shutil.which("dpkg") is None:
        return []
    listing = subprocess.run(["dpkg", "-L", DEBIAN_PACKAGE], capture_output=True, text=True, check=False)
    paths = [Path(line) for line in listing.stdout.splitlines()]
    return [path for path in paths if path.name in (name, f"{name}.gz") and path.is_file()]


def _download(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST  # 4 s to import, and needed once in a machine's life

    try:
        FashionMNIST(str(folder), download=True)
    except (RuntimeError, OSError, HTTPException) as error:
        # _find says what else can be done; the reason of the failed download is worth seeing.
        print(f"torchvision's download failed: {error}")


def _fit(images: ImageSet, data: Data) -> ImageSet:
    """Fashion-MNIST in another size or with three channels, if params.yaml asks for that."""
    pixels = images.images
    assert isinstance(pixels, np.ndarray)
    if data.resize != pixels.shape[-1]:
        import torch

        resized = torch.nn.functional.interpolate(
            torch.from_numpy(pixels.copy()), size=data.resize, mode="bilinear", antialias=True
        )
        pixels = resized.numpy()
    if data.image_size != data.resize:
        edge = round((data.resize - data.image_size) / 2.0)
        pixels = pixels[..., edge : edge + data.image_size, edge : edge + data.image_size]
    if data.channels == 3:
        pixels = np.repeat(pixels, 3, axis=1)
    return ImageSet(pixels, images.labels)


def _digits(data: Data) -> dict[str, ImageSet]:
    from sklearn.model_selection import train_test_split

    from attention_transfer.data import shifts  # which takes a second

    pixels, labels = shifts.digits(data.image_size, data.channels)
    parts = train_test_split(np.arange(len(labels)), test_size=TEST_DIGITS, stratify=labels, random_state=0)
    return {
        split: ImageSet(pixels[rows], labels[rows])
        for split, rows in zip(("train", "test"), map(np.sort, parts), strict=True)
    }


def _from_timm(data: Data, split: str) -> tuple[list[str], ImageSet]:
    """Decodes every image once: shorter side to `resize`, then the centre."""
    from timm.data import create_dataset
    from torch.utils.data import IterableDataset
    from torchvision import transforms

    if "/" not in data.source and not (Path(data.folder) / split).exists():
        # timm would take a folder of a similar name, or the images of all splits together.
        raise StudyError(
            f"has no folder {split!r} with the images of this split",
            where=f"data.folder {data.folder}",
            remedy="name folders that are there in data.train_split and data.test_split",
        )
    try:
        dataset = create_dataset(
            data.source, root=data.folder, split=split, download=data.source.startswith("torch/")
        )
    except Exception as error:  # timm passes on whatever its readers raise
        raise StudyError(
            f"timm.data.create_dataset({data.source!r}, split={split!r}) failed: {error}",
            where=f"data.source, data.folder = {data.folder}",
            remedy="give a source that timm opens as a map-style data set, such as 'folder' for one folder of "
            "images per class, below one folder per split",
        ) from error
    if isinstance(dataset, IterableDataset):
        raise StudyError(
            f"{data.source!r} is an iterable data set: its images have no numbers",
            where="data.source",
            remedy="bring it as a folder of images, or as another map-style data set",
        )
    mode = "L" if data.channels == 1 else "RGB"
    shape = transforms.Compose([transforms.Resize(data.resize), transforms.CenterCrop(data.image_size)])
    pixels = np.empty((len(dataset), data.channels, data.image_size, data.image_size), np.uint8)
    labels = np.empty(len(dataset), np.int64)
    for index in tqdm(range(len(dataset)), desc=f"decode {split}", unit="image", mininterval=5):
        try:
            image, labels[index] = _decode(dataset, index, mode)
            pixels[index] = (
                np.asarray(shape(image)).reshape(data.image_size, data.image_size, -1).transpose(2, 0, 1)
            )
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = dataset.filename(index) if hasattr(dataset, "filename") else f"image {index}"
            raise StudyError(
                f"{name} cannot be decoded: {error}",
                where=f"{data.folder}, split {split}",
                remedy="replace or remove this file",
            ) from error
    return _class_names(dataset, labels), ImageSet(pixels, labels)


def _decode(dataset: Any, index: int, mode: str) -> tuple[Image.Image, int]:
    if not hasattr(dataset, "reader"):
        image, label = dataset[index]
        return image.convert(mode), label
    # Asked itself, timm's data set puts the next image, with its label, in place of a broken one.
    file, label = dataset.reader[index]
    with file, Image.open(file) as image:
        return image.convert(mode), label


def _class_names(dataset: object, labels: np.ndarray) -> list[str]:
    """From the reader's (folders) or the data set's (torchvision) mapping, else the numbers."""
    reader = getattr(dataset, "reader", None)
    mapping = getattr(reader, "class_to_idx", None) or getattr(dataset, "class_to_idx", None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    return [str(label) for label in range(int(labels.max()) + 1)]
