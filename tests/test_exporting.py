"""Students as timm models: the same logits, to the bit, in a process that knows nothing of the study."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
from exportable_study import build
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.numpy import load_file
from test_commands_new import CLASSES, draw
from tiny_study import ARCHITECTURE, CPU, make_study
from torch import nn

import attention_transfer.__main__ as commands
from attention_transfer import config
from attention_transfer.assembly import Parts
from attention_transfer.commands.export import Wishes, export
from attention_transfer.config import Architecture, Study
from attention_transfer.data import images, sources
from attention_transfer.errors import StudyError
from attention_transfer.exporting import accuracies, card, onnx_file, timm_folder
from attention_transfer.exporting.subject import Subject, find
from attention_transfer.layout import Layout
from attention_transfer.models import students, vit

ROOT = Path(__file__).parents[1]
COMPONENTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "layer_scale": ("layer_scale",),
    "registers": ("registers",),
    "rotary": ("rotary",),
    "relative_bias": ("relative_bias",),
    "relative_bias_and_others": ("relative_bias", "layer_scale", "swiglu"),
    "swiglu": ("swiglu",),
    "pre_norm": ("pre_norm",),
    "qk_norm": ("qk_norm",),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    folder = tmp_path_factory.mktemp("exportable")
    return folder, build(folder)


@pytest.fixture
def study(built: tuple[Path, Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Study]:
    """In the folder of a copy, whose files a test may damage."""
    folder, made = built
    shutil.copytree(folder, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    before = signal.getsignal(signal.SIGTERM)
    yield made
    signal.signal(signal.SIGTERM, before)


def subject_of(folder: Path, study: Study) -> Subject:
    """A model that no stage has trained."""
    return Subject(study, Layout.of(study), "run", "runs", 0, folder, "train@run-0", {}, "")


def noisy(architecture: Architecture, folder: Path, image_size: int = 8, channels: int = 1) -> vit.ViT:
    """A model that is saved with random numbers in all of its weights, zeros and ones of the start included."""
    arguments = vit.model_arguments(architecture, image_size=image_size, channels=channels, classes=3)
    model = vit.create(arguments, seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    students.save(folder, model, arguments, ())
    return students.load(folder, made_by="train@run-0")


def in_a_fresh_process(script: str, *arguments: object) -> None:
    """Runs a script that must not be able to import this package."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    threads = str(torch.get_num_threads())
    hidden = "import sys; sys.modules['attention_transfer'] = None\n"
    subprocess.run(
        [sys.executable, "-c", hidden + script, *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": threads},
        check=True,
        timeout=600,
    )


LOAD = """
import json, numpy, timm, torch
from pathlib import Path
from PIL import Image
pixels = numpy.load(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    prepared = torch.stack([prepare(Image.fromarray(image[0])) for image in pixels])
    with torch.inference_mode():
        logits = model(prepared)
    names = numpy.array(model.pretrained_cfg["label_names"])
    numpy.savez(folder.with_suffix(".npz"), prepared=prepared, logits=logits, names=names)
"""


@pytest.mark.slow
def test_timm_gives_the_students_logits_in_a_process_of_its_own(study: Study, tmp_path: Path) -> None:
    exported = {export(study, name, None, Wishes()): name for name in ("distill", "many", "tutor")}
    expected = {
        folder: students.load(find(study, name, None, graph="").folder, made_by="")
        for folder, name in exported.items()
    }
    description = images.describe(Layout.of(study).images)
    for name, components in COMPONENTS.items():
        architecture = Architecture.model_validate(ARCHITECTURE | {"components": components})
        folder = Path("exports") / name
        folder.mkdir()
        expected[folder] = noisy(architecture, tmp_path / name)
        timm_folder.write(folder, subject_of(tmp_path / name, make_study("scratch")), description, "mit")
    parts = Parts(study, Layout.of(study), CPU)
    np.save("pixels.npy", parts.test.images)
    in_a_fresh_process(LOAD, "pixels.npy", *expected)
    normalised = parts.clean(parts.test.images)(np.arange(len(parts.test)))
    for folder, model in expected.items():
        found = np.load(folder.with_suffix(".npz"))
        assert found["names"].tolist() == ["a", "b", "c"]
        np.testing.assert_allclose(
            found["prepared"], normalised, atol=2e-6
        )  # scaled to 0..1 before, not after
        with torch.inference_mode():
            np.testing.assert_array_equal(
                found["logits"], model(torch.from_numpy(found["prepared"])), folder.name
            )


def test_timm_prepares_a_folder_of_images_as_the_study_does(tmp_path: Path) -> None:
    """From the JPEGs of two sizes, neither of which is the model's."""
    for split, count in (("train", 4), ("test", 3)):
        draw(tmp_path / "flowers", split, count)
    where = {"data.source": "folder", "data.folder": str(tmp_path / "flowers")}
    made = make_study("scratch", {**where, "data.image_size": 16, "data.channels": 3})
    names, sets = sources.read(made.data)
    description = images.save(tmp_path / "data", "folder", names, sets)
    noisy(Architecture.model_validate(ARCHITECTURE), tmp_path / "model", 16, 3)
    (tmp_path / "made").mkdir()
    timm_folder.write(tmp_path / "made", subject_of(tmp_path / "model", made), description, "unknown")
    model = timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    prepare = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    files = [
        tmp_path / "flowers" / "test" / name / f"{number}.jpg" for name in CLASSES for number in range(3)
    ]
    prepared = np.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (description.mean, description.std))
    np.testing.assert_allclose(prepared, (sets["test"].images / 255 - mean) / std, atol=1e-5)


def test_other_weights_are_found_by_their_logits(study: Study, tmp_path: Path) -> None:
    model = noisy(Architecture.model_validate(ARCHITECTURE), tmp_path / "model")
    description = images.describe(Layout.of(study).images)
    made = tmp_path / "made"
    made.mkdir()
    timm_folder.write(made, subject_of(tmp_path / "model", make_study("scratch")), description, "mit")
    pixels = torch.randn(5, 1, 8, 8)
    timm_folder.check(made, model, pixels)
    with torch.no_grad():
        model.head.bias[1] += 1e-6
    with pytest.raises(StudyError, match=r"timm [\d.]+: the student gives other logits there"):
        timm_folder.check(made, model, pixels)


def test_the_weights_are_the_students_bytes(study: Study) -> None:
    folder = export(study, "distill", 1, Wishes(folder=Path("out")))
    made = [path / "model.safetensors" for path in (folder, Layout.of(study).student("distill", 1))]
    assert made[0].read_bytes() == made[1].read_bytes()
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    prepared = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    description = images.describe(Layout.of(study).images)
    assert (prepared["mean"], prepared["std"]) == (description.mean, description.std)
    assert (prepared["input_size"], prepared["fixed_input_size"], prepared["crop_pct"]) == (
        [1, 8, 8],
        True,
        1.0,
    )
    assert (prepared["interpolation"], prepared["license"], prepared["num_classes"]) == ("bilinear", "mit", 3)


def test_the_card_says_what_the_records_say(study: Study) -> None:
    found = ModelCard.load(export(study, "distill", 1, Wishes()) / "README.md")
    header = found.data
    assert (header.license, header.library_name, header.datasets) == (
        "mit",
        "timm",
        ["zalando-datasets/fashion_mnist"],
    )
    scores = pd.read_csv("metrics/tiny/evaluate/scores.csv").set_index(["run", "set", "seed"])["accuracy"]
    results = {result.metric_name: result.metric_value for result in header.eval_results}
    assert results == {
        "Accuracy, test": scores["distill", "test", 1],
        "Accuracy, validation": scores["distill", "validation", 1],
    }
    right = round(12 * scores["distill", "test", 1])
    stored = load_file("runs/tiny/predictions/distill/1/test.safetensors")
    assert right == (stored["logits"].argmax(1) == stored["labels"]).sum()
    z, n, share = 1.959963984540054, 12, right / 12  # Wilson, 1927
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    own = f"{100 * share:.2f} [{100 * (centre - half):.2f}, {100 * (centre + half):.2f}]"
    values = np.array([scores["distill", "test", seed] for seed in (0, 1)])
    spread = 12.706204736174694 * abs(values[0] - values[1]) / 2  # Student's t of one degree of freedom
    mean = f"{100 * values.mean():.2f} [{100 * (values.mean() - spread):.2f}, {100 * (values.mean() + spread):.2f}]"
    assert f"| test | 12 | {own} | {mean}, n = 2 |" in found.content
    digest = hashlib.sha256(Path("runs/tiny/students/distill/1/model.safetensors").read_bytes()).hexdigest()
    for part in (
        digest,
        "`first`: random weights, seed 1",
        '"epochs": 3',
        '"weight_decay": 0.05',
        "`a`, `b`, `c`",
    ):
        assert part in found.content
    assert '"folder"' not in found.content


def test_the_card_of_a_fine_tuned_teacher_has_its_validation_accuracy(study: Study) -> None:
    found = ModelCard.load(export(study, "tutor", None, Wishes()) / "README.md")
    accuracy = json.loads(Path("metrics/tiny/finetuned/metrics.json").read_text())[
        "tutor_validation_accuracy"
    ]
    assert [result.metric_value for result in found.data.eval_results] == [accuracy]
    assert "fine-tuned teacher `tutor`, seed 3" in found.content
    assert '"other"' not in found.content
    with pytest.raises(StudyError, match=r"finetuned_teachers\.tutor: has the seed 3 alone"):
        export(study, "tutor", 4, Wishes())


def test_the_licence_is_known_only_where_nothing_of_others_is_in_the_weights(study: Study) -> None:
    distill = find(study, "distill", None, graph="")
    assert card.licence(distill) == "mit"
    brought = {"kind": "file", "architecture": ARCHITECTURE, "path": "a.safetensors", "sha256": "0" * 64}
    others = make_study("distill", {"teachers.first": brought})
    assert card.licence(dataclasses.replace(distill, study=others, name="run")) == "unknown"
    assert card.licence(dataclasses.replace(distill, study=make_study("scratch"), name="run")) == "mit"
    own = make_study("scratch", {"data.source": "folder"})
    assert card.licence(dataclasses.replace(distill, study=own, name="run")) == "unknown"
    by_hand = make_study("distill_logits", {"teachers.first": brought})
    assert card.licence(dataclasses.replace(distill, study=by_hand, name="run")) == "unknown"
    folder = export(study, "distill", None, Wishes(licence="apache-2.0"))
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == "apache-2.0"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "rotary", "relative_bias_and_others"])
def test_onnx_gives_the_logits_for_batches_of_any_size(name: str, tmp_path: Path) -> None:
    architecture = Architecture.model_validate(ARCHITECTURE | {"components": COMPONENTS[name]})
    model, pixels = noisy(architecture, tmp_path / "model"), torch.randn(7, 1, 8, 8)
    path = tmp_path / "model.onnx"
    agreement = onnx_file.write(path, model, pixels)
    assert 0 <= agreement.difference <= agreement.allowed
    made = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in made.opset_import] == [("", onnx_file.OPSET)]
    assert b"site-packages" not in path.read_bytes()
    session = onnxruntime.InferenceSession(str(path))
    with torch.inference_mode():
        exact = model.double()(pixels.double()).numpy()
    for size in (1, 4, 7):
        (logits,) = session.run(None, {"images": pixels[:size].numpy()})
        np.testing.assert_allclose(logits, exact[:size], atol=1e-4 * np.abs(exact).max())


class OtherwiseWhenExported(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = pixels.flatten(1)[:, :3]
        return logits * 1.001 if torch.compiler.is_exporting() else logits


def test_onnx_with_other_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"other logits in onnxruntime than in PyTorch, by up to .*; allowed: "
    ):
        onnx_file.write(tmp_path / "model.onnx", OtherwiseWhenExported().eval(), torch.randn(5, 1, 8, 8))


@pytest.mark.slow
def test_a_failed_check_leaves_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    with pytest.raises(StudyError, match="other logits in onnxruntime"):
        export(study, "distill", None, Wishes(onnx=True))
    assert not [*Path("exports").rglob("*distill*")]


def test_without_the_packages_it_says_what_to_install(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StudyError, match=r"(?s)--onnx: needs the package onnxruntime.*pip install"):
        export(study, "distill", None, Wishes(onnx=True))
    assert not Path("exports").exists()
    assert export(study, "distill", None, Wishes()).exists()


def said(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command itself says when it fails."""
    monkeypatch.setattr(sys, "argv", ["attention_transfer", "export", *arguments])
    with pytest.raises(SystemExit) as failed:
        commands.main()
    return str(failed.value.code)


def test_what_cannot_be_exported_is_said_with_what_to_do(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "copies its teacher's attention at every pass" in said(monkeypatch, "copy")
    assert "known are distill, copy, many, tutor, other" in said(monkeypatch, "nothing")
    assert "known are 0, 1" in said(monkeypatch, "distill", "--seed", "7")
    assert "--push OWNER/NAME" in said(monkeypatch, "distill", "--public")
    Path("studies/tiny").mkdir(parents=True)
    Path("studies/tiny/dvc.yaml").touch()
    shutil.rmtree("runs/tiny/students/distill/1")
    assert "dvc repro studies/tiny/dvc.yaml:train@distill-1" in said(monkeypatch, "distill", "--seed", "1")
    shutil.rmtree("runs/tiny/finetuned/tutor")
    assert "dvc repro studies/tiny/dvc.yaml:finetuned" in said(monkeypatch, "tutor")
    Path("metrics/tiny/evaluate/run.json").unlink()
    assert "dvc repro studies/tiny/dvc.yaml:evaluate" in said(monkeypatch, "distill")
    assert not Path("exports").exists()


def test_a_name_that_is_two_things_is_asked_about(study: Study) -> None:
    both = study.model_copy(update={"finetuned_teachers": {"distill": study.finetuned_teachers["tutor"]}})
    with pytest.raises(StudyError, match=r"runs\.distill or finetuned_teachers\.distill"):
        find(both, "distill", None, graph="")
    assert find(both, "runs.distill", None, graph="").stage == "train@distill-0"


def test_changed_params_are_no_recipe_of_old_weights(study: Study) -> None:
    faster = study.runs["distill"].model_copy(update={"learning_rate": 0.02})
    changed = study.model_copy(update={"runs": study.runs | {"distill": faster}})
    with pytest.raises(StudyError, match=r"runs\.distill: has changed since it was trained"):
        export(changed, "distill", None, Wishes())


def test_other_images_are_not_those_that_it_was_trained_on(study: Study) -> None:
    layout = Layout.of(study)
    changed = {split: images.load(layout.images, split) for split in ("train", "test")}
    changed["train"].images[0, 0, 0, 0] ^= 1
    images.save(layout.images, "made up", ["a", "b", "c"], changed)
    for name in ("distill", "tutor"):
        with pytest.raises(StudyError, match="runs/tiny/data: holds other images than it was trained on"):
            export(study, name, None, Wishes())


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("distill", "runs/tiny/students/distill/0/model.safetensors"),
        ("distill", "runs/tiny/students/distill/0/config.json"),
        ("distill", "runs/tiny/predictions/distill/0/test.safetensors"),
        ("distill", "metrics/tiny/evaluate/scores.csv"),
        ("distill", "metrics/tiny/predict/distill/0/run.json"),
        ("distill", "metrics/tiny/train/distill/0/run.json"),
        ("tutor", "runs/tiny/finetuned/tutor/model.safetensors"),
        ("tutor", "metrics/tiny/finetuned/metrics.json"),
    ],
)
def test_a_damaged_file_is_refused(study: Study, name: str, path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[len(content) * 2 // 3] ^= 1
    Path(path).write_bytes(content)
    with pytest.raises(StudyError, match=r"dvc repro|remake"):
        export(study, name, None, Wishes())
    assert not Path("exports").exists()


def test_an_evaluation_of_other_predictions_is_refused(study: Study) -> None:
    """The student was trained and predicted with anew; the tables are the old ones."""
    shutil.copytree("runs/tiny/predictions/many/1", "runs/tiny/predictions/distill/0", dirs_exist_ok=True)
    with pytest.raises(StudyError, match=r"is not about the predictions that lie there"):
        export(study, "distill", None, Wishes())


def test_a_student_that_was_trained_anew_is_not_the_one_of_the_records(study: Study) -> None:
    shutil.copytree("runs/tiny/students/distill/1", "runs/tiny/students/distill/0", dirs_exist_ok=True)
    with pytest.raises(StudyError, match=r"(?s)not the student whose predictions.*predict@distill-0"):
        export(study, "distill", None, Wishes())


def test_a_folder_is_kept_if_it_is_the_same_and_never_overwritten(study: Study) -> None:
    out = Wishes(folder=Path("out"))
    folder = export(study, "distill", 0, out)
    inode = folder.stat().st_ino
    assert export(study, "distill", 0, out).stat().st_ino == inode
    with pytest.raises(
        StudyError, match=r"out: is there already, and is something else: README.md, config.json"
    ):
        export(study, "distill", 1, out)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match=r"notes\.txt differs"):
        export(study, "distill", 0, out)
    Path("file").write_text("mine")
    with pytest.raises(StudyError, match="is there already"):
        export(study, "distill", 0, Wishes(folder=Path("file")))
    assert Path("file").read_text() == "mine"
    with pytest.raises(StudyError, match="is there already"):
        export(study, "distill", 0, Wishes(folder=Path()))
    assert not [*Path().glob(".tmp-*")]


def test_a_full_disk_leaves_nothing(study: Study, tmpfs: Path) -> None:
    with contextlib.suppress(OSError):
        (tmpfs / "others").write_bytes(bytes(2**20))
    with (tmpfs / "others").open("r+b") as file:
        file.truncate(2**20 - 3 * 4096)
    with pytest.raises(StudyError, match="cannot be written: No space left"):
        export(study, "distill", None, Wishes(folder=tmpfs / "out"))
    assert [path.name for path in tmpfs.iterdir()] == ["others"]


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_nothing(study: Study) -> None:
    """By SIGTERM not even what is unfinished; by SIGKILL no folder, and the next one clears up."""
    command = [sys.executable, "-m", "attention_transfer", "export", "distill", "--out", "out"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while not [*Path().glob(".tmp-*-out")]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(number)
        process.wait(600)
        assert not Path("out").exists()
        assert bool([*Path().glob(".tmp-*-out")]) == (number == signal.SIGKILL)
    export(study, "distill", None, Wishes(folder=Path("out")))
    assert not [*Path().glob(".tmp-*")]


def test_accuracy_under_shift_is_the_mean_over_shifts_and_severities(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the records of the study that lies in this repository."""
    monkeypatch.chdir(ROOT)
    core = config.load("params.yaml")
    shifts = core.model_copy(update={"evaluation": core.evaluation.model_copy(update={"sets": ("shifts",)})})
    subject = dataclasses.replace(subject_of(Path(), shifts), name="distill", seed=1)
    [found] = accuracies.read(subject)
    table = pd.read_csv("metrics/core/evaluate/scores.csv")
    rows = table[(table["run"] == "distill") & (table["set"] == "shifts")]
    by_seed = [rows[rows["seed"] == seed] for seed in core.seeds]
    assert {len(each) for each in by_seed} == {len(core.evaluation.shifts) * len(core.evaluation.severities)}
    assert found.value == pytest.approx(by_seed[1]["accuracy"].mean())
    assert found.nll == pytest.approx(by_seed[1]["nll"].mean())
    assert found.examples == core.evaluation.shift_images
    assert found.seeds is not None
    assert (found.seeds.mean, found.seeds.n) == (pytest.approx(rows["accuracy"].mean()), len(core.seeds))
    assert found.seeds.low < found.seeds.mean < found.seeds.high
