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
import release_files
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file
from timm.data.readers.img_extensions import get_img_extensions

from attention_transfer import config
from attention_transfer.commands import new
from attention_transfer.errors import StudyError
from attention_transfer.models import timm_entries

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
    given = {"size": None, "teacher": None, "heads": None, "format": None} | changes
    given["teacher"] = None if given["teacher"] is None else str(given["teacher"])
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
        ({"teacher": text, "heads": 2}, "is not a whole file of weights"),
        ({"size": 7}, r"presets/flowers\.yaml: .*image_size"),
    ):
        with pytest.raises(StudyError, match=message):
            write(**changes)  # type: ignore[arg-type]
        assert not list(repository.glob("presets/*"))
        assert not (repository / "studies").exists()
    write()
    with pytest.raises(StudyError, match=r"flowers\.yaml: is there already"):
        write()


def test_images_are_those_that_timm_will_read(repository: Path) -> None:
    assert set(new.ENDINGS) == set(get_img_extensions())
    for name in CLASSES:
        Image.new("RGB", (40, 40)).save(repository / "flowers" / "train" / name / "late.webp")
    counts = new.look(Path("flowers")).counts
    read = {
        name: len([path for path in Path("flowers", "train", name).iterdir() if path.suffix == ".jpg"])
        for name in CLASSES
    }
    assert counts == read


def test_a_published_teacher_is_written_without_its_weights(repository: Path) -> None:
    """timm's configurations come with it: sizes, components and what its images were like."""
    study = config.load(write(teacher="timm:vit_small_patch14_reg4_dinov2.lvd142m"))
    teacher = study.teachers["teacher"]
    assert teacher.kind == "timm"
    assert teacher.name == "vit_small_patch14_reg4_dinov2.lvd142m"
    assert teacher.architecture == timm_entries.described("vit_small_patch14_reg4_dinov2").architecture
    assert study.data.image_size == 518
    assert study.runs["distill"].learning_rate == pytest.approx(
        1e-4 * study.runs["distill"].batch_size / 256, rel=0.1
    )


def test_the_size_of_a_published_teachers_images_can_be_chosen(repository: Path) -> None:
    study = config.load(write(teacher="timm:vit_small_patch16_224.dino", size=96))
    assert study.data.image_size == 96
    shutil.rmtree(repository / "studies")
    (repository / "presets" / "flowers.yaml").unlink()
    with pytest.raises(StudyError, match=r"patch_size: 16 does not divide data\.image_size, 100"):
        write(teacher="timm:vit_small_patch16_224.dino", size=100)
    with pytest.raises(StudyError, match=r"--teacher: vit_small_patch16_224\.dano is no published model"):
        write(teacher="timm:vit_small_patch16_224.dano")
    with pytest.raises(StudyError, match=r"choose one that is: .*vit_small_patch16_224\."):
        write(teacher="timm:vit_smal_patch16_224.dino")


@pytest.mark.parametrize(
    ("release", "format", "changes", "entry"),
    [
        ("MAE, encoder", "mae", {"embed_dim": 192, "num_heads": 3}, None),
        ("MoCo v3", None, {"embed_dim": 384, "num_heads": 12}, None),
        (
            "DINOv2 with registers",
            None,
            {"embed_dim": 384, "num_heads": 6, "img_size": 56},
            "vit_small_patch14_reg4_dinov2",
        ),
        ("BEiTv2", None, {"embed_dim": 768, "num_heads": 12}, "beitv2_base_patch16_224"),
    ],
)
def test_a_release_tells_its_architecture(
    release: str, format: str | None, changes: dict[str, int], entry: str | None, repository: Path
) -> None:
    path = repository / "weights.pth"
    model = release_files.write(path, release, **changes)
    study = config.load(write(teacher=path, format=format))
    teacher = study.teachers["teacher"]
    assert teacher.kind == "file"
    assert teacher.architecture.timm == entry
    assert teacher.architecture.heads == changes["num_heads"] == model.blocks[0].attn.num_heads
    assert teacher.architecture.width == changes["embed_dim"]
    assert study.data.image_size == changes.get("img_size", release_files.SIZE)


def test_a_format_that_does_not_show_is_asked_for(repository: Path) -> None:
    path = repository / "weights.pth"
    release_files.write(path, "DeiT")
    with pytest.raises(StudyError, match="does not tell whose layout"):
        write(teacher=path)
    with pytest.raises(StudyError, match="--format: dei is no format"):
        write(teacher=path, format="dei")
    release_files.write(path, "DINOv2")
    with pytest.raises(StudyError, match="is 16 wide, and of dinov2"):
        write(teacher=path)
