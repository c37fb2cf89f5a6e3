"""A study on GPUs that are not here: by arithmetic that can be done by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
from safetensors.torch import load_file
from torch import Tensor

from attention_transfer.config import Study
from attention_transfer.data import images
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import ImageFiles, Shape
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout
from attention_transfer.measuring import counts, disk, flops_of_runs, gpus, memory, workload
from attention_transfer.measuring.counts import Counts
from attention_transfer.measuring.gpus import Rates, longest_queue
from attention_transfer.training import loop
from attention_transfer.training.checkpoint import Checkpoint

TINY = Layout("tiny")
COUNTED = Counts(train=60, test=12, shifted={}, unknown=(), classes=3)


def make(**changes: Any) -> Study:
    """A copy run and a distilled one of 9 steps of 8 images each, two seeds."""
    values = tiny_study.make_study("copy", changes).model_dump()
    distill = {**values["runs"]["run"], "method": "distill", "attention_loss": {"weight": 1.0}}
    values["runs"]["distill"] = distill
    values["finetuned_teachers"] = {}
    return Study.model_validate({**values, "seeds": (0, 1)})


def in_files(study: Study) -> Study:
    data = study.data.model_copy(update={"source": "files", "train_split": "a", "test_split": "b"})
    return study.model_copy(update={"data": data})


def stages(study: Study, **options: bool) -> dict[tuple[str, str], workload.Stage]:
    return {(stage.kind, stage.name): stage for stage in workload.stages(study, COUNTED, **options)}


def test_what_training_and_predictions_have_to_do() -> None:
    study = make()
    found = stages(study)
    training = flops_of_runs.training(study, "distill", 3).both
    clean = flops_of_runs.predicting(study, "distill", 3, cached=True).both
    # 3 epochs of 24 images, one point of the curve of 8, and 9 validation images at the end.
    train, predict = found["train", "distill-1"], found["predict", "distill-1"]
    assert (train.images, train.flops) == (72 + 17, 72 * training + 17 * clean)
    assert (predict.images, predict.flops) == (9, 9 * clean)
    again = stages(study, recomputing=True)["train", "distill-1"]
    assert again.flops - train.flops == 72 * clean
    assert found["probe", "first"].images == 24 + 9
    assert ("cache", "first") not in found
    cached = stages(make(**{"attention.source": "cache"}))
    assert cached["cache", "first"].flops == (48 + 9) * flops_of_runs.reading(study, "first")


def test_fine_tuned_teachers_are_one_stage() -> None:
    study = tiny_study.make_study("distill_logits")
    found = stages(study)["finetuned", ""]
    each = [workload.stages(study.tutors, COUNTED), workload.stages(study, COUNTED)]
    assert found.flops > max(stage.flops for stage in each[1] if stage.kind == "train")
    of_one = flops_of_runs.training(study.tutors, "tutor", 3).both * 72
    clean = flops_of_runs.predicting(study.tutors, "tutor", 3, cached=True).both * 17
    assert (found.flops, found.images, found.shared) == (2 * (of_one + clean), 2 * 89, False)


def test_constants_are_those_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workload.SIMILARITY_IMAGES == tiny_study.script("similarity").IMAGES
    monkeypatch.setattr(FilePixels, "statistics", lambda self: (len(self), len(self)))
    none = np.empty(0, np.int64)
    for count in (12, 25_000, 1_281_167):
        pixels = FilePixels(ImageFiles(Path(), [], none, none, none), np.arange(count), Shape(3, 8, 8))
        assert stages_of_data(count) == images.statistics(pixels)[0]


def stages_of_data(count: int) -> int:
    counted = Counts(train=count, test=0, shifted={}, unknown=(), classes=3)
    return workload.stages(make(), counted)[0].images


def test_longest_queue() -> None:
    assert longest_queue([3.0, 1.0, 1.0, 4.0], 1) == 9
    assert longest_queue([3.0, 1.0, 1.0, 4.0], 2) == 6  # 3 and 1 1 4
    assert longest_queue([3.0, 1.0], 8) == 3


def seconds_of(study: Study, rates: Rates, gpus_of_each: int, jobs: int) -> float:
    """By the clock: students side by side, equal ones after each other, everything else alone."""
    found = workload.stages(study, COUNTED)
    taken = {
        (stage.kind, stage.name): gpus.seconds(
            stage, rates, gpus_of_each, files=study.data.source == "files"
        )[0]
        for stage in found
    }
    alone = sum(value for (kind, _), value in taken.items() if kind not in ("train", "predict"))
    students = [
        taken["train", f"{run}-{seed}"] + taken["predict", f"{run}-{seed}"] for run, seed in study.grid
    ]
    return alone + longest_queue(students, jobs)


def test_hours_of_one_gpu_are_those_of_all_stages() -> None:
    study, rates = make(), Rates(tflops=1e-9)
    found = gpus.fleet(study, COUNTED, rates, 1)
    flops = sum(stage.flops for stage in workload.stages(study, COUNTED))
    assert found.hours == pytest.approx(flops / 1e3 / 3600)
    assert (found.busy, found.limited) == (pytest.approx(1.0), "compute")
    assert found.setting == gpus.Setting(1, 1, None, False, False)


def test_many_gpus_find_too_few_students() -> None:
    study, rates = make(), Rates(tflops=1e-9, node=4)
    found = gpus.fleet(study, COUNTED, rates, 64)
    assert found.setting is not None
    assert (found.setting.processes, found.setting.jobs, found.limited) == (4, 4, "too few students")
    assert found.hours == pytest.approx(seconds_of(study, rates, 4, 4) / 3600)
    assert found.busy is not None
    assert found.busy < 0.3
    # Students go side by side where that ends as soon: 4 on 4 GPUs, since what runs alone is nearly nothing.
    few = gpus.fleet(study, COUNTED, rates, 4)
    assert few.hours == pytest.approx(min(seconds_of(study, rates, p, 4 // p) for p in (1, 2, 4)) / 3600)


def test_decoding_limits_images_in_files_alone() -> None:
    slow = Rates(tflops=1e6, cores=2, decoded=5.0)
    study = make()
    assert gpus.fleet(study, COUNTED, slow, 1).limited == "compute"
    found = gpus.fleet(in_files(study), COUNTED, slow, 1)
    shown = sum(stage.images for stage in workload.stages(study, COUNTED))
    assert found.limited == "decoding"
    assert found.hours == pytest.approx(shown / 10 / 3600)


def test_memory_decides_on_passes_checkpoints_and_sharding() -> None:
    architecture = {"patch_size": 1, "width": 32, "depth": 4, "heads": 2, "mlp_ratio": 4.0}
    study = make(
        **{"teachers.first.architecture": architecture, "data.labelled": 40, "runs.run.batch_size": 40}
    )
    needed = {name: memory.of_run(study, name, 3) for name in study.runs}

    def setting(gigabytes: float, number: int = 1) -> gpus.Setting | None:
        return gpus.fleet(study, COUNTED, Rates(memory=gigabytes / memory.USABLE), number).setting

    def room(images_of_a_pass: float, *, checkpointing: bool) -> float:
        return max(
            each.fixed(1, sharded=False) + images_of_a_pass * each.of_an_image(checkpointing=checkpointing)
            for each in needed.values()
        ) / 1e9  # fmt: skip

    assert setting(room(40.5, checkpointing=False)) == gpus.Setting(1, 1, None, False, False)
    assert setting(room(9.5, checkpointing=False)) == gpus.Setting(1, 1, 9, False, False)
    again = setting(room(7.5, checkpointing=False))
    assert again is not None
    assert again.checkpointing
    assert again.micro_batch is None or again.micro_batch > 7
    assert setting(room(0.5, checkpointing=True)) is None
    sharded = max(each.fixed(8, sharded=True) + each.recomputed * 1.5 for each in needed.values()) / 1e9
    assert sharded < room(0.5, checkpointing=True)
    assert setting(sharded) is None
    found = gpus.fleet(study, COUNTED, Rates(memory=sharded / memory.USABLE), 8)
    assert found.setting is not None
    assert found.setting.sharding
    assert found.setting.processes > 1
    assert gpus.fleet(study, COUNTED, Rates(memory=1e-6), 8).limited == "memory"


def test_counts_are_read_known_or_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert counts.count(make(), TINY, {}, None) == Counts(60_000, 10_000, {}, (), 10)
    study = in_files(make())
    with pytest.raises(StudyError, match="--classes"):
        counts.count(study, TINY, {}, None)
    with pytest.raises(StudyError, match="elsewhere"):
        counts.count(study, TINY, {"elsewhere": 1}, 3)
    values = study.model_dump()
    values["evaluation"] |= {
        "sets": ("test", "shifts", "published"), "shifts": ("fog",), "severities": (1, 2),
        "published": {
            "sketches": {"layout": "class_names", "folder": "a"},
            "corrupted": {"layout": "corruptions", "folder": "b", "images": 50, "corruptions": ("snow",)},
        },
    }  # fmt: skip
    values["data"] |= {"image_size": 16, "resize": 16}
    study = Study.model_validate(values)
    found = counts.count(study, TINY, {}, 3)
    known = {"fog-1": 9, "fog-2": 9, "corrupted-snow-1": 50, "corrupted-snow-2": 50}
    assert (found.train, found.test, found.shifted) == (24 + 9, 0, known)
    assert found.unknown == ("test", "sketches")
    found = counts.count(study, TINY, {"test": 7, "sketches": 30, "corrupted": 20}, 3)
    assert (found.test, found.unknown, found.shifted["sketches"]) == (7, (), 30)
    assert found.shifted["corrupted-snow-2"] == 20
    tiny_study.write_inputs(tmp_path)
    assert counts.count(in_files(make()), TINY, {}, None) == COUNTED


def test_disk_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_study.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    study = tiny_study.make_study("copy", {"runs.run.ema": 0.9, "attention.source": "cache"})
    for teacher in study.teachers:
        for which in ("views", "validation"):
            tiny_study.script("cache").write(tiny_study.make_parts(study), teacher, which)
    tiny_study.run_train(study, TINY, "run", 0)
    found = disk.needed(study, TINY, counts.count(study, TINY, {}, None), jobs=1)
    assert found["images, decoded"] == sum(
        np.load(TINY.images / f"{split}_images.npy").nbytes for split in ("train", "test")
    )
    assert found["students"] == nbytes(load_file(TINY.student("run", 0) / "model.safetensors"))
    assert found["teachers"] == sum(nbytes(load_file(TINY.teacher_weights(name))) for name in study.teachers)
    assert found["cached attention"] == sum(
        path.stat().st_size for path in TINY.cache("first").parent.rglob("*") if path.is_file()
    )
    [file] = Path("checkpoints").rglob("state.pt")
    state = Checkpoint(file.parent).load()
    assert state is not None
    kept = [*state["optimizer"]["state"].values(), state["model"], state["average"]]
    counters = len(state["optimizer"]["state"]) * 4
    assert found["checkpoints"] == 2 * (sum(map(nbytes, kept)) - counters)
    assert found["predictions"] == 9 * (4 * 3 + 16)


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def test_a_teachers_own_images_are_counted_and_decoded(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    for number in range(19):
        (tmp_path / "others" / f"{number}.jpg").touch()
    teacher = {
        "kind": "simmim", "architecture": tiny_study.ARCHITECTURE, "images": str(tmp_path / "others"),
        "epochs": 3, "warmup_epochs": 0, "batch_size": 4, "learning_rate": 0.01, "weight_decay": 0.05,
        "crop_scale": (0.5, 1.0), "mask_ratio": 0.5, "seed": 0,
    }  # fmt: skip
    study = tiny_study.make_study("scratch", {"teachers.first": teacher})
    shown = 3 * 16  # of 19 images, whole batches
    assert stages(study)["pretrain", "first"].images == shown
    assert stages(study)["pretrain", "first"].flops == shown * flops_of_runs.pretraining(study, "first")
    (tmp_path / "others").rename(tmp_path / "elsewhere")
    with pytest.raises(StudyError, match="is not there"):
        stages(study)
