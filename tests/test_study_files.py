"""A study of JPEGs that stay in their files, with RandAugment and noise: its stages, one after another."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from attention_transfer.data import images, shifted
from attention_transfer.evaluation import predictions
from attention_transfer.layout import Layout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 50), "red": (200, 40, 30)}
STAGES = (
    ("data",),
    ("split",),
    ("pretrain", "--teacher", "mae"),
    ("cache", "--teacher", "mae"),
    ("shifts",),
    ("resolve", "--run", "distill"),
    ("train", "--run", "distill", "--seed", "0"),
    ("predict", "--run", "distill", "--seed", "0"),
    ("evaluate",),
)


def write_images(folder: Path) -> None:
    """Of three colours, in any shape, with noise."""
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for name, colour in COLOURS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                height, width = random.integers(30, 60, 2)
                pixels = np.array(colour) + random.normal(0, 40, (height, width, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.jpg")


def publish(folder: Path, images: Path) -> None:
    """Two of the classes under their names, and all of them by number."""
    for number, name in enumerate(sorted(COLOURS)):
        shutil.copytree(images / "test" / name, folder / "numbered" / str(number))
        if name != "green":
            shutil.copytree(images / "test" / name, folder / "few" / name)


def write_params(path: Path) -> None:
    values = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text(encoding="utf-8"))
    values["data"] |= {"source": "files", "folder": "pictures", "resize": 32, "image_size": 28, "channels": 3}
    values["data"] |= {"labelled": 45, "validation": 9}
    values["views"] |= {"rand_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "erase_with": "noise"}
    values["views"] |= {"mixup": 0.8, "cutmix": 1.0}
    values["training"]["curve_images"] = 9
    values["teachers"]["mae"]["batch_size"] = 21
    values |= {"seeds": [0], "runs": {"distill": values["runs"]["distill"]}, "ensembles": {}, "report": None}
    values["runs"]["distill"] |= {"epochs": 20, "batch_size": 14, "learning_rate": 0.003}
    values["evaluation"] |= {"sets": ["validation", "test", "shifts", "published"], "shift_images": 12}
    values["evaluation"]["published"] = {
        "few": {"layout": "class_names", "folder": "published/few"},
        "numbered": {"layout": "class_numbers", "folder": "published/numbered", "images": 4},
        "absent": {"layout": "class_names", "folder": "published/absent"},
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


def run(folder: Path, path: str, *stage: str, workers: int) -> None:
    done = subprocess.run(
        ["/usr/bin/env", "python", str(ROOT / "pipeline" / f"{stage[0]}.py"), *stage[1:]],
        cwd=folder,
        env={
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT / "src"),
            "ATTENTION_TRANSFER_DEVICE": "cpu",
            "ATTENTION_TRANSFER_WORKERS": str(workers),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_every_stage_works_on_files(tmp_path: Path, warm_path: str) -> None:
    """The student learns the colours; with another number of processes it has the same weights."""
    write_images(tmp_path / "pictures")
    publish(tmp_path / "published", tmp_path / "pictures")
    write_params(tmp_path / "params.yaml")
    for stage in STAGES:
        run(tmp_path, warm_path, *stage, workers=2)
    student = tmp_path / "runs" / "smoke" / "students" / "distill" / "0" / "model.safetensors"
    found = tmp_path / "runs" / "smoke" / "predictions" / "distill" / "0"
    test = predictions.load(found / "test.safetensors", made_by="predict")
    assert len(test.labels) == 24
    assert test.correct.double().mean() > 0.6
    assert {path.stem for path in found.iterdir()} >= {"validation", "test", "contrast-5", "few", "numbered"}
    scores = pd.read_csv(tmp_path / "metrics" / "smoke" / "evaluate" / "scores.csv").set_index("shift")
    assert scores.loc["few", "examples"] == 16
    assert scores.loc["numbered", "examples"] == 4
    assert "absent" not in scores.index
    # Of the same images, without the third class: no worse than on all of the test set's.
    of_two = test.labels != sorted(COLOURS).index("green")
    assert scores.loc["few", "accuracy"] >= test.correct[of_two].double().mean()

    weights = load_file(student)
    student.unlink()
    run(tmp_path, warm_path, "train", "--run", "distill", "--seed", "0", workers=1)
    again = load_file(student)
    assert all(again[name].equal(value) for name, value in weights.items())


def small(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 18), (len(path.parts) * 9, 90, sum(map(ord, path.parent.name)) % 255)).save(path)


def test_the_imagenet_preset_reads_the_published_layouts(tmp_path: Path, warm_path: str) -> None:
    """A thousand classes and the folders of V2, A, R, Sketch and C, with the true names; ObjectNet is missing."""
    lists = importlib.resources.files("timm.data").joinpath("_info")
    synsets = lists.joinpath("imagenet_synsets.txt").read_text().split()
    subset = {which: lists.joinpath(f"imagenet_{which}_synsets.txt").read_text().split() for which in "ar"}
    data = tmp_path / "data"
    for synset in synsets:
        for number in range(2):
            small(data / "imagenet" / "train" / synset / f"{synset}_{number}.JPEG")
        small(data / "imagenet" / "val" / synset / f"ILSVRC2012_val_{synset}.JPEG")
    for number in range(1000):
        small(data / "imagenetv2-matched-frequency-format-val" / str(number) / "0.jpeg")
    for which, names in subset.items():
        for synset in names:
            small(data / f"imagenet-{which}" / synset / "0.jpg")
    for synset in synsets[:10]:
        small(data / "sketch" / synset / "sketch_0.JPEG")
        small(data / "imagenet-c" / "fog" / "3" / synset / "ILSVRC2012_val_00000001.JPEG")
    values = yaml.safe_load((ROOT / "presets" / "imagenet1k.yaml").read_text(encoding="utf-8"))
    values["data"] |= {"labelled": 1000, "validation": 1000}
    values["training"]["curve_images"] = 1000
    for name in values["runs"]:
        values["runs"][name]["batch_size"] = 256
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    for stage in ("data", "split", "shifts"):
        run(tmp_path, warm_path, stage, workers=2)

    layout = Layout("imagenet1k")
    description = images.describe(tmp_path / layout.images)
    assert description.classes == sorted(synsets)
    train = images.load(tmp_path / layout.images, "train")
    assert train.images.shape == (2000, 3, 224, 224)
    shifts = tmp_path / layout.shifts
    found = set(shifted.manifest(shifts))
    assert found == {"imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_c-fog-3"}
    for name, count in (
        ("imagenet_v2", 1000),
        ("imagenet_a", 200),
        ("imagenet_r", 200),
        ("imagenet_sketch", 10),
    ):
        part, _ = shifted.load(shifts, name)
        groups = shifted.groups(shifts, name)
        assert groups is not None
        assert (len(part), (groups >= 0).sum(), groups.max() + 1) == (count, count, count)
    recorded = json.loads((tmp_path / layout.metrics / "shifts" / "metrics.json").read_text())
    assert recorded["missing_sets"] == 3 - 1 + 1 + 74  # two variants of V2, ObjectNet, the other sets of C
