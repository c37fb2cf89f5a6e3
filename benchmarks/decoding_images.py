"""Images a second from JPEGs in files to normalised batches, against the decoder alone.

    python benchmarks/decoding_images.py [--quick]

Generated JPEGs of ImageNet's usual size, 500 x 375, in the page cache. All sides work in the same processes, as many
as there are cores: `decoder`, Pillow alone: decoding, the same crops, resizing, and RandAugment where the study has
it; no checksum, nothing kept or sent anywhere. `loader`, the views of `data/rendering.py`, checked, sent, joined,
normalised and erased, as training reads them. `checksum` is the share of the loader's work that finds changed files.
`evaluation` is `predict_all` on a device that takes as long for a batch as its images take to be decoded, which sleep
stands for: with each batch begun while the one before it is computed, against one after another.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import measure
import numpy as np
import torch
import xxhash
from PIL import Image

from attention_transfer.data import decoding, image_files, rendering, views, workers
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Entry, Shape
from attention_transfer.data.views import ViewRecipe
from attention_transfer.evaluation.predictions import BATCH, predict_all
from attention_transfer.training.machine import prepare
from attention_transfer.training.prefetch import Prefetch

SIDES, QUALITY = (500, 375), 90
FORM = Shape(channels=3, resize=256, size=224)
TARGET, EVALUATION_TARGET = 0.85, 0.65
POLICIES = {"crop and flip": None, "RandAugment": "rand-m9-mstd0.5-inc1"}


class Params:
    """The part of params.yaml's views that a recipe reads."""

    crop_scale, crop_ratio, flip = (0.08, 1.0), (0.75, 1.3333), 0.5
    erase_with = "noise"

    def __init__(self, rand_augment: str | None) -> None:
        self.rand_augment = rand_augment
        self.erase = 0.25 if rand_augment else 0.0


def generate(folder: Path, count: int) -> None:
    """Pictures with as much detail as photographs have: noise of falling strength at rising frequency."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((SIDES[1], SIDES[0], 3))
        for octave in range(1, 8):
            coarse = random.normal(0, 1, (2**octave * 3 // 4 + 1, 2**octave + 1, 3))
            layers = [Image.fromarray(coarse[..., c].astype(np.float32)) for c in range(3)]
            pixels += (
                np.stack([np.asarray(each.resize(SIDES, Image.Resampling.BICUBIC)) for each in layers], 2)
                * 60
                / octave
            )
        path = folder / "class" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def decode(entries: Sequence[Entry], recipe: ViewRecipe, examples: np.ndarray) -> None:
    """In a process of the pool."""
    numbers = views.uniforms(recipe.key, examples, 1, 2 * decoding.TRIES + 5, skip=views.SKIPPED["picture"])
    for entry, drawn in zip(entries, numbers.tolist(), strict=True):
        with Image.open(entry.path) as image:
            shown = decoding.crop_and_flip(image.convert("RGB"), recipe, FORM.size, drawn)
            if recipe.rand_augment is not None:
                decoding.augmented(shown, recipe, FORM, drawn[-2:])


def in_pool(entries: list[Entry], recipe: ViewRecipe, examples: np.ndarray) -> None:
    """Small shares of the images, so that every process has work to the end."""
    shares = np.array_split(np.arange(len(entries)), len(entries) // 8 or 1)
    waiting = [
        workers.pool().submit(decode, [entries[row] for row in share], recipe, examples[share])
        for share in shares
    ]
    for each in waiting:
        each.result()


def load(render: rendering.Render, batches: np.ndarray) -> None:
    """Every batch, as `training/student_task.py` reads them: rendered by a thread, the one behind it begun."""

    def read(number: int) -> torch.Tensor:
        if number + 1 < len(batches):
            render.begin(batches[number + 1], 1)
        return render(batches[number], 1)

    with Prefetch(read) as loader:
        for number in range(len(batches)):
            loader.take(number)
            if number + 1 < len(batches):
                loader.ask(number + 1)


def evaluate(
    clean: rendering.CleanImages, count: int, begin: Callable[[np.ndarray], None], seconds: float
) -> None:
    """Every image, by a device that takes so long for a full batch."""

    def predict(rows: np.ndarray) -> torch.Tensor:
        clean(rows)
        time.sleep(seconds * len(rows) / BATCH)
        return torch.zeros(len(rows), 1)

    predict_all(predict, count, begin)


def read_all(entries: list[Entry], *, checked: bool) -> None:
    """In this process alone."""
    for entry in entries:
        content = Path(entry.path).read_bytes()
        if checked and xxhash.xxh3_64_intdigest(content) != entry.checksum:
            raise ValueError(entry.name)


def main() -> None:
    options = measure.arguments(__doc__)
    count, batch, repeats = (8, 4, 1) if options.quick else (512, 64, 7)
    prepare()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary), count)
        _, _, files = image_files.index(Path(temporary), classes=None, progress="index")
        pixels, examples = FilePixels(files, np.arange(count), FORM), np.arange(count)
        entries = pixels.entries(examples)
        for name, policy in POLICIES.items():
            recipe = ViewRecipe.of(Params(policy), dataset="d", seed=0, mean=[0.5] * 3, std=[0.25] * 3)
            render = rendering.views_of(recipe, pixels, examples)
            batches = examples.reshape(-1, batch)
            times = measure.medians(
                {
                    "decoder": functools.partial(in_pool, entries, recipe, examples),
                    "loader": functools.partial(load, render, batches),
                },
                repeats=repeats,
                warm_up=1,
                device=torch.device("cpu"),
            )
            speeds = {key: count / seconds for key, seconds in times.items()}
            print(name, {key: f"{value:.0f} images/s" for key, value in speeds.items()})
            results.append(
                measure.Result(
                    f"decoding images: loader against the decoder alone, {name} (cpu)",
                    speeds["loader"] / speeds["decoder"],
                    TARGET,
                    "higher",
                    "x",
                )
            )
        clean = rendering.clean_images(recipe, pixels, torch.device("cpu"))
        rows = examples[:BATCH]
        alone = measure.medians(
            {"batch": lambda: clean(rows)}, repeats=repeats, warm_up=1, device=torch.device("cpu")
        )
        seconds = alone["batch"] * BATCH / len(rows)
        times |= measure.medians(
            {
                "evaluation": functools.partial(evaluate, clean, count, clean.begin, seconds),
                "evaluation in turn": functools.partial(evaluate, clean, count, lambda rows: None, seconds),
            },
            repeats=repeats,
            warm_up=1,
            device=torch.device("cpu"),
        )
        results.append(
            measure.Result(
                "decoding images: evaluation, batches begun ahead against one after another (cpu)",
                times["evaluation"] / times["evaluation in turn"],
                EVALUATION_TARGET,
                "lower",
                "x",
            )
        )
        spent = measure.medians(
            {
                "read": functools.partial(read_all, entries, checked=False),
                "checked": functools.partial(read_all, entries, checked=True),
            },
            repeats=repeats,
            warm_up=1,
            device=torch.device("cpu"),
        )
        share = (spent["checked"] - spent["read"]) / (workers.count() * times["loader"])
        results.append(
            measure.Result(
                "decoding images: checksums, share of the loader's work (cpu)", share, None, "lower", "of it"
            )
        )
    measure.write(results, options)


if __name__ == "__main__":
    main()
