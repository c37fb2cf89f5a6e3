"""A study of one's own images: written, checked, and begun."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file

from attention_transfer import config
from attention_transfer.commands import new
from attention_transfer.errors import StudyError

ROOT = Path(__file__).parent.parent
CLASSES = ("daisy", "rose", "tulip")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a study needs, with a folder of images of two sizes."""
    root = tmp_path / "repository"
    root.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, root)
    for name in ("pipeline", "src", "presets"):
        (root / name).symlink_to(ROOT / name) if name != "presets" else (root / name).mkdir()
    draw(root / "flowers", "train", 40)
    draw(root / "flowers", "test", 10)
    monkeypatch.chdir(root)
    return root


def draw(folder: Path, split: str, count: int, mode: str = "RGB") -> None:
    """JPEGs whose colour depends on the class."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / split / name).mkdir(parents=True)
        for number in range(count):
            size = (48, 36) if number % 2 else (40, 60)
            pixels = generator.integers(0, 80, (*size, 3), dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).convert(mode).save(folder / split / name / f"{number}.jpg")


def write(images: str = "flowers", **changes: object) -> Path:
    given = {"size": None, "teacher": None, "heads": None} | changes
    return new.write("flowers", Path(images), **given)  # type: ignore[arg-type]


def test_the_study_is_one_that_can_be_run(repository: Path) -> None:
    study = config.load(write())
    assert study.name == "flowers"
    assert (study.data.source, study.data.folder) == ("folder", "flowers")
    assert (study.data.train_split, study.data.test_split) == ("train", "test")
    assert (study.data.channels, study.data.image_size) == (3, 36)
    assert study.data.labelled + study.data.validation <= 120
    assert {run.method for run in study.runs.values()} == {"scratch", "finetune", "copy", "distill"}
    [teacher] = study.teachers.values()
    assert study.data.image_size // teacher.architecture.patch_size == 6
    studies = repository / "studies" / "flowers"
    graph = yaml.safe_load((studies / "dvc.yaml").read_text(encoding="utf-8"))
    assert graph["stages"] == yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert (studies / graph["vars"][1]).resolve() == repository / "presets" / "flowers.yaml"


@pytest.mark.slow
def test_its_first_stages_run(repository: Path) -> None:
    write(size=16)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "ATTENTION_TRANSFER_DEVICE": "cpu"}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{repository}/mlflow.db"
    for stage in ("data", "split", "shifts"):
        done = subprocess.run(
            [sys.executable, f"pipeline/{stage}.py", "--params", "presets/flowers.yaml"],
            cwd=repository, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (repository / "metrics" / "flowers" / "shifts" / "run.json").exists()


def test_grey_images_have_one_channel(repository: Path) -> None:
    for split, count in (("train", 10), ("test", 5)):
        draw(repository / "grey", split, count, mode="L")
    study = config.load(write("grey"))
    assert study.data.channels == 1


def test_a_teacher_of_ones_own(repository: Path) -> None:
    model = timm.models.VisionTransformer(
        img_size=36, patch_size=6, embed_dim=24, depth=3, num_heads=2, mlp_ratio=2.0, num_classes=0
    )
    path = repository / "teacher.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(StudyError, match=r"how many heads.*\n.*--heads"):
        write(teacher=path)
    study = config.load(write(teacher=path, heads=2))
    teacher = study.teachers["teacher"]
    assert teacher.kind == "file"
    assert teacher.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert teacher.architecture.model_dump(exclude={"components"}) == {
        **{"patch_size": 6, "width": 24, "depth": 3, "heads": 2, "mlp_ratio": 2.0}
    }


def test_what_cannot_be_used_is_said_and_nothing_is_written(repository: Path) -> None:
    damaged = repository / "damaged"
    shutil.copytree("flowers", damaged)
    for path in damaged.glob("train/*/*.jpg"):
        path.write_bytes(b"no image")
    apart = repository / "apart"
    shutil.copytree("flowers", apart)
    shutil.rmtree(apart / "test" / "rose")
    only_train = repository / "only_train"
    shutil.copytree("flowers/train", only_train / "train")
    text = repository / "text.safetensors"
    text.write_text("no weights")
    for changes, message in (
        ({"images": "nowhere"}, "nowhere: is no folder"),
        ({"images": "only_train"}, "has no test images"),
        ({"images": "apart"}, "different classes: rose"),
        ({"images": "damaged"}, "cannot be read"),
        ({"teacher": text, "heads": 2}, "holds no weights of timm's VisionTransformer"),
        ({"size": 7}, r"presets/flowers\.yaml: .*image_size"),
    ):
        with pytest.raises(StudyError, match=message):
            write(**changes)  # type: ignore[arg-type]
        assert not list(repository.glob("presets/*"))
        assert not (repository / "studies").exists()
    write()
    with pytest.raises(StudyError, match=r"flowers\.yaml: is there already"):
        write()
