"""`new`: a study of one's own images, and of one's own teacher."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from attention_transfer import config, graph_file
from attention_transfer.config import HUB, SHIFTS, Architecture
from attention_transfer.errors import StudyError
from attention_transfer.files import atomic, sha256, write_text

TRAIN, TEST = ("train", "training"), ("test", "val", "validation", "valid")
ENDINGS = (".png", ".jpg", ".jpeg")  # what timm's reader of folders takes, by which its study reads them
PATCHES = 8  # at most, along a side, of a teacher that is pre-trained here
LARGEST = 64  # pixels of its images, unless asked for more: two cores are what a first try has
LOOKED_AT = 50  # images whose size and colours say what all are like
STEPS = 4600  # of pre-training, as many as the default study's
RUNS = {
    "scratch": "learning_rate: 0.0015",
    "finetune": "learning_rate: 0.0045, layer_decay: 0.75",
    "copy": "layers: all, learning_rate: 0.0015",
    "distill": "layers: all, attention_loss: { weight: 3.0, reduction: sum }, learning_rate: 0.0135",
}
LARGE = 192  # width from which a teacher is one of those that are published
LARGE_RUNS = {
    "scratch": "learning_rate: 0.00002, weight_decay: 0.3, betas: [0.9, 0.95], drop_path: 0.2",
    "finetune": "learning_rate: 0.0002, layer_decay: 0.75",
    "copy": "layers: all, learning_rate: 0.0002, layer_decay: 0.75",
    "distill": "layers: all, attention_loss: { weight: 3.0, reduction: sum }, learning_rate: 0.00002, "
    "weight_decay: 0.3, betas: [0.9, 0.95], drop_path: 0.2",
}
NAMING = "choose another name: a small letter, then small letters, digits and _, 40 at most"
TIMM = "timm:"  # begins the name of a published teacher


@dataclass(frozen=True)
class Found:
    """What lies in a folder of images.

    Attributes:
        train, test: names of the splits.
        counts: training images by class.
        tested: number of test images.
        channels: 1 where all images that were looked at are grey.
        shorter: median of their shorter side, in pixels.
    """

    train: str
    test: str
    counts: Mapping[str, int]
    tested: int
    channels: int
    shorter: int


def write(
    name: str, images: Path, *, size: int | None, teacher: str | None, heads: int | None, format: str | None
) -> Path:
    """Writes presets/<name>.yaml and studies/<name>/; gives the former.

    Args:
        images: folder of a folder for each split, of a folder for each class.
        size: of the images in pixels; None for what fits them and a small machine, or the teacher.
        teacher: `timm:<entry>.<tag>`, `hf-hub:<owner>/<model>`, or a file with weights; None to pre-train one on the
            images.
        heads: of a teacher in a file, whose weights do not tell; None for those of its format.
        format: of such a file, where its content does not tell.

    Raises:
        StudyError: there is such a study, the images or the weights cannot be used.
    """
    preset, folder = Path("presets") / f"{name}.yaml", Path("studies") / name
    for path in (preset, folder):
        if path.exists():
            raise StudyError("is there already", where=str(path), remedy="choose another name, or remove it")
    if not Path("dvc.yaml").exists():
        raise StudyError("is not here", where="dvc.yaml", remedy="go to the folder of the repository")
    found = look(images)
    brought = None if teacher is None else _brought(teacher, heads, format)
    size = size or (_fitting(found) if brought is None else brought.size)
    architecture = _own(size, heads) if brought is None else brought.architecture
    large = architecture.width >= LARGE
    values = _values(name, images, found, size) | {
        "brought": brought and brought.keys,
        "architecture": architecture.flow(),
        "large": large,
        "runs": LARGE_RUNS if large else RUNS,
    }
    environment = Environment(
        loader=PackageLoader("attention_transfer.commands"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    with atomic(preset) as temporary:
        temporary.write_text(environment.get_template("study.yaml.j2").render(values), encoding="utf-8")
        try:
            config.load(temporary)  # an impossible size, say, is said before anything is there
        except StudyError as error:
            remedy = NAMING if error.problem.startswith("name: ") else "choose another --size"
            raise StudyError(error.problem, where=str(preset), remedy=remedy) from error
    folder.mkdir(parents=True)
    write_text(folder / "where.yaml", f"where:\n  root: ../..\n  params: {preset}\n")
    write_text(
        folder / "dvc.yaml", graph_file.of_study(Path("dvc.yaml").read_text(encoding="utf-8"), folder, preset)
    )
    return preset


def look(images: Path) -> Found:
    """Which splits, classes and kind of images a folder has.

    Raises:
        StudyError: it has no two splits of the same classes, or holds no image that can be read.
    """
    layout = "<folder>/train/<class>/<image>.jpg and <folder>/test/<class>/<image>.jpg"
    if not images.is_dir():
        raise StudyError("is no folder", where=str(images), remedy=f"put the images there as {layout}")
    splits = {path.name for path in images.iterdir() if path.is_dir()}
    train, test = (next((name for name in names if name in splits), None) for names in (TRAIN, TEST))
    if train is None or test is None:
        raise StudyError(
            f"has no {'training' if train is None else 'test'} images, only {sorted(splits) or 'nothing'}",
            where=str(images),
            remedy=f"put them there as {layout}",
        )
    files = {split: _by_class(images / split) for split in (train, test)}
    if files[train].keys() != files[test].keys():
        apart = sorted(files[train].keys() ^ files[test].keys())
        raise StudyError(
            f"its splits {train} and {test} have different classes: {', '.join(apart[:5])}",
            where=str(images),
            remedy="give both the same class folders, each with images",
        )
    if len(files[train]) < 2:
        raise StudyError(
            f"has {len(files[train])} classes with images, at least two are needed",
            where=str(images / train),
            remedy=f"put the images there as {layout}; images are {', '.join(ENDINGS)}",
        )
    every = [path for paths in files[train].values() for path in paths]
    looked_at = [_kind(path) for path in random.Random(0).sample(every, min(LOOKED_AT, len(every)))]
    return Found(
        train,
        test,
        {name: len(paths) for name, paths in files[train].items()},
        sum(map(len, files[test].values())),
        channels=1 if all(grey for grey, _ in looked_at) else 3,
        shorter=int(statistics.median(shorter for _, shorter in looked_at)),
    )


def _by_class(folder: Path) -> dict[str, list[Path]]:
    found = {
        path.name: sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    return {name: files for name, files in found.items() if files}


def _kind(path: Path) -> tuple[bool, int]:
    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "I;16"), min(image.size)
    except (OSError, UnidentifiedImageError) as error:
        raise StudyError(
            f"cannot be read: {error}", where=str(path), remedy="replace or remove it"
        ) from error


def _values(name: str, images: Path, found: Found, size: int) -> dict[str, Any]:
    count, classes = sum(found.counts.values()), len(found.counts)
    validation = max(classes, min(3000, count // 5))
    labelled = min(max(500, 10 * classes), count - validation)
    batch = min(256, count)
    epochs = max(2, round(STEPS / (count // batch)))
    return {
        "name": name,
        "folder": str(images),
        "train": found.train,
        "test": found.test,
        "channels": found.channels,
        "images": f"{count:,}",
        "classes": classes,
        "validation": validation,
        "labelled": labelled,
        "size": size,
        "batch": min(50, labelled),
        "shift_images": min(400, found.tested),
        "shifts": SHIFTS,
        "budget_gb": 4.0,
        "pretraining_epochs": epochs,
        "pretraining_batch": batch,
        "steps": f"{epochs * (count // batch):,}",
    }


def _fitting(found: Found) -> int:
    """A size that has many divisors: no image is enlarged, as far as they are alike."""
    return max(8, min(LARGEST, found.shorter // 4 * 4))


@dataclass(frozen=True)
class Brought:
    """A teacher that is not pre-trained here.

    Attributes:
        keys: of params.yaml, without its architecture.
        size: of the images that it was trained on, in pixels.
    """

    keys: Mapping[str, str]
    architecture: Architecture
    size: int


def _own(size: int, heads: int | None) -> Architecture:
    """Of a teacher that is pre-trained on images of that size."""
    patch_size = next(side for side in range(1, size + 1) if size % side == 0 and size // side <= PATCHES)
    return Architecture(patch_size=patch_size, width=96, depth=6, heads=heads or 4, mlp_ratio=4.0)


def _brought(teacher: str, heads: int | None, format: str | None) -> Brought:
    if teacher.startswith((TIMM, HUB)):
        return _by_name(teacher.removeprefix(TIMM))
    return _from_file(Path(teacher), heads, format)


def _by_name(name: str) -> Brought:
    """From the configurations that come with timm, or from the Hub's; weights are not downloaded."""
    from attention_transfer.models import timm_entries, weights_of_timm

    found = weights_of_timm.tagged(name, where="--teacher")
    architecture = timm_entries.described(found.entry).architecture
    return Brought({"kind": "timm", "name": name}, architecture, found.image_size)


def _from_file(path: Path, heads: int | None, format: str | None) -> Brought:
    """From the shapes of the weights, and what is known of the format.

    Raises:
        StudyError: the file cannot be read, or does not tell its architecture.
    """
    from attention_transfer.models import releases, timm_entries

    if format is not None and format not in releases.FORMATS:
        raise StudyError(
            f"{format} is no format", where="--format", remedy=f"choose one of {', '.join(releases.FORMATS)}"
        )
    released = releases.load(path, format, where="--teacher")
    shapes = {name: tuple(value.shape) for name, value in released.encoder.items()}
    known = releases.FORMATS[released.format]
    try:
        width, _, patch_size, _ = shapes["patch_embed.proj.weight"]
        hidden = shapes["blocks.0.mlp.fc1.weight"][0] if known.entries is None else 0
    except (KeyError, ValueError) as error:
        raise StudyError(
            f"holds no weights of a Vision Transformer: {error}",
            where=str(path),
            remedy="bring a file of one of the formats in docs/teachers.md",
        ) from error
    if known.entries is not None:
        if width not in known.entries:
            raise StudyError(
                f"is {width} wide, and of {released.format} these are known: {sorted(known.entries)}",
                where=str(path),
                remedy="write the study's teacher by hand, as docs/teachers.md shows",
            )
        entry = known.entries[width]
        if "register_tokens" in shapes:
            entry = entry.replace("_dinov2", "_reg4_dinov2")
        architecture = timm_entries.described(entry).architecture
    else:
        heads = heads or known.heads.get(width)
        if heads is None:
            raise StudyError(
                "does not tell how many heads its attention has", where=str(path), remedy="say it: --heads 12"
            )
        scaled = {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & shapes.keys()
        architecture = Architecture(
            patch_size=patch_size,
            width=width,
            depth=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
            heads=heads,
            mlp_ratio=hidden / width,
            components=("layer_scale",) if scaled else (),
            class_token="cls_token" in shapes,
        )
    keys = {"kind": "file", "path": json.dumps(str(path)), "sha256": sha256(path)}
    if released.format != "timm":
        keys["format"] = released.format
    side = releases.places(released.encoder, prefix=int("cls_token" in shapes))
    return Brought(keys, architecture, patch_size * (side or 224 // patch_size))
