"""Images a second from JPEGs in files to normalised batches, against the decoder alone.

    python benchmarks/decoding_images.py [--quick]

Generated JPEGs of ImageNet's usual size, 500 x 375, in the page cache. All sides work in the same processes, as many
as there are cores: `decoder`, Pillow's decoding and nothing else; `views`, decoding, cropping and resizing (and
RandAugment where the study has it), with nothing sent anywhere; `loader`, the views of `data/rendering.py`, sent,
joined and normalised, as training reads them: one batch is rendered while the one before is taken.
"""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import measure
import numpy as np
import torch
from PIL import Image

from attention_transfer.data import decoding, image_files, rendering, workers
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Entry, Shape
from attention_transfer.data.views import ViewRecipe
from attention_transfer.training.prefetch import Prefetch

SIDES, QUALITY = (500, 375), 90
FORM = Shape(channels=3, resize=256, size=224)
TARGET = 0.85
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


def decode(entries: Sequence[Entry]) -> None:
    """In a process of the pool."""
    for entry in entries:
        with Image.open(io.BytesIO(entry.read())) as image:
            image.convert("RGB")


def show(entries: Sequence[Entry], recipe: ViewRecipe, examples: np.ndarray) -> None:
    """In a process of the pool."""
    decoding.render(entries, FORM, recipe, examples, 1)


def in_pool(
    work: Callable[..., None], entries: list[Entry], *arguments: object, examples: np.ndarray | None
) -> None:
    """Shares of the images, one a process."""
    shares = np.array_split(np.arange(len(entries)), workers.count())
    waiting = [
        workers._pool().submit(
            work,
            [entries[row] for row in share],
            *arguments,
            *([] if examples is None else [examples[share]]),
        )
        for share in shares
    ]
    for each in waiting:
        each.result()


def load(render: rendering.Render, batches: np.ndarray) -> None:
    """Every batch, each rendered while the one before is taken."""
    with Prefetch(lambda number: render(batches[number], 1)) as loader:
        for number in range(len(batches)):
            loader.take(number)
            if number + 1 < len(batches):
                loader.ask(number + 1)


def main() -> None:
    options = measure.arguments(__doc__)
    count, batch, repeats = (8, 4, 1) if options.quick else (512, 128, 7)
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
                    "decoder": functools.partial(in_pool, decode, entries, examples=None),
                    "views": functools.partial(in_pool, show, entries, recipe, examples=examples),
                    "loader": functools.partial(load, render, batches),
                },
                repeats=repeats,
                warm_up=1,
                device=torch.device("cpu"),
            )
            speeds = {key: count / seconds for key, seconds in times.items()}
            print(name, {key: f"{value:.0f} images/s" for key, value in speeds.items()})
            results += [
                measure.Result(
                    f"decoding images: loader against its views, {name} (cpu)",
                    speeds["loader"] / speeds["views"],
                    TARGET,
                    "higher",
                    "x",
                ),
                measure.Result(
                    f"decoding images: loader against the decoder alone, {name} (cpu)",
                    speeds["loader"] / speeds["decoder"],
                    None,
                    "higher",
                    "x",
                ),
            ]
    measure.write(results, options)


if __name__ == "__main__":
    main()
