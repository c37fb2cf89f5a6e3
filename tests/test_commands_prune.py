"""`prune`: finds what params.yaml needs no longer, and touches nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_study

from attention_transfer.commands import prune
from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout

TINY = Layout("tiny")
CHANGES = {
    "attention.source": "cache",
    "evaluation.sets": ("validation", "test", "shifts"),
    "evaluation.shifts": ("fog",),
    "evaluation.severities": (1, 3),
    "data.image_size": 16,
}
STUDY = tiny_study.make_study("copy", CHANGES)
NEEDED = (
    "runs/tiny/data/train_images.npy",
    "runs/tiny/splits/labelled.txt",
    "runs/tiny/students/run/0/model.safetensors",
    "runs/tiny/students/.gitignore",
    "runs/tiny/predictions/run/0/test.safetensors",
    "runs/tiny/predictions/run/0/fog-3.safetensors",
    "runs/tiny/resolved/run.json",
    "runs/tiny/teachers/first/model.safetensors",
    "runs/tiny/finetuned/tutor/model.safetensors",
    "runs/tiny/finetuned/names.json",
    "runs/tiny/cache/first/manifest.json",
    "runs/tiny/cache/first/views/shard-00000.safetensors",
    "runs/tiny/cache/first/.views.lock",
    "runs/tiny/cache/second/test/shard-00000.safetensors",
    "runs/tiny/shifts/fog-1.npz",
    "runs/tiny/shifts/manifest.json",
    "runs/tiny/shifts/contact_sheet.npz",
    "runs/tiny/maps/maps.npz",
    "metrics/tiny/train/run/0/run.json",
    "metrics/tiny/evaluate/scores.csv",
    "metrics/tiny/cache/first/run.json",
    "reports/tiny/report.html",
    ".ckpt/tiny/train-run-0-0123456789abcdef/state.pt",
    ".ckpt/tiny/finetuned-0123456789abcdef/0123456789abcdef/state.pt",
    "runs/other/students/gone/0/model.safetensors",
    "metrics/other/train/gone/0/run.json",
    ".ckpt/other/train-gone-0-0123456789abcdef/state.pt",
    "params.yaml",
)
STALE = {  # by file, the path that is to go
    "runs/tiny/students/gone/0/model.safetensors": "runs/tiny/students/gone",
    "runs/tiny/students/run/7/model.safetensors": "runs/tiny/students/run/7",
    "runs/tiny/predictions/run/0/digits.safetensors": "runs/tiny/predictions/run/0/digits.safetensors",
    "runs/tiny/predictions/gone/0/test.safetensors": "runs/tiny/predictions/gone",
    "runs/tiny/resolved/gone.json": "runs/tiny/resolved/gone.json",
    "runs/tiny/teachers/third/model.safetensors": "runs/tiny/teachers/third",
    "runs/tiny/finetuned/gone/model.safetensors": "runs/tiny/finetuned/gone",
    "runs/tiny/cache/third/views/shard-00000.safetensors": "runs/tiny/cache/third",
    "runs/tiny/cache/first/old/shard-00000.safetensors": "runs/tiny/cache/first/old",
    "runs/tiny/shifts/fog-2.npz": "runs/tiny/shifts/fog-2.npz",
    "runs/tiny/shifts/snow-1.npz": "runs/tiny/shifts/snow-1.npz",
    "metrics/tiny/train/gone/0/run.json": "metrics/tiny/train/gone",
    "metrics/tiny/predict/run/7/run.json": "metrics/tiny/predict/run/7",
    "metrics/tiny/pretrain/third/run.json": "metrics/tiny/pretrain/third",
    ".ckpt/tiny/train-gone-0-0123456789abcdef/state.pt": ".ckpt/tiny/train-gone-0-0123456789abcdef",
    ".ckpt/tiny/train-run-7-0123456789abcdef/state.pt": ".ckpt/tiny/train-run-7-0123456789abcdef",
    "runs/tiny/data/.tmp-999999999-train_images.npy": "runs/tiny/data/.tmp-999999999-train_images.npy",
    "runs/tiny/.tmp-999999999-plan/mae/shard-00000.safetensors": "runs/tiny/.tmp-999999999-plan",
}


def put(name: str, size: int = 10) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file() or path.is_symlink()}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in NEEDED:
        put(name)
    return folder


def found(study: Study = STUDY) -> dict[str, prune.Stale]:
    return {str(stale.path): stale for stale in prune.find(study, TINY)}


def delete_all(study: Study = STUDY) -> None:
    prune.show(study, delete_too=True)


def test_a_study_as_params_has_it_is_left_alone() -> None:
    assert found() == {}
    delete_all()
    assert files() == set(NEEDED)


def test_everything_stale_is_found_and_nothing_else_goes() -> None:
    for name in STALE:
        put(name)
    assert set(found()) == set(STALE.values())
    prune.show(STUDY, delete_too=False)
    assert files() == {*NEEDED, *STALE}
    delete_all()
    assert files() == set(NEEDED)
    assert not any(Path(path).exists() for path in STALE.values())


def test_what_experiments_need_stays_as_long_as_the_study_names_them() -> None:
    heads = STUDY.model_copy(update={"name": "tiny/heads", "runs": {"copy_a_head": STUDY.runs["run"]}})
    theirs = {
        "runs/tiny/experiments/heads/students/copy_a_head/0/model.safetensors",
        "runs/tiny/experiments/heads/predictions/copy_a_head/0/test.safetensors",
        "runs/tiny/experiments/heads/resolved/copy_a_head.json",
        "metrics/tiny/train/copy_a_head/0/run.json",
        "metrics/tiny/predict/copy_a_head/0/run.json",
        "metrics/tiny/resolve/copy_a_head/run.json",
        "metrics/tiny/evaluate/heads/scores.csv",
        ".ckpt/tiny/heads/train-copy_a_head-0-0123456789abcdef/state.pt",
        ".ckpt/tiny/heads/dvc.lock",
    }
    stale = {
        "runs/tiny/experiments/heads/students/gone/0/model.safetensors",
        "runs/tiny/experiments/heads/predictions/copy_a_head/1/test.safetensors",
        "runs/tiny/experiments/gone/resolved/run.json",
        "metrics/tiny/evaluate/gone/scores.csv",
        "metrics/tiny/similarity/gone/cka.csv",
        ".ckpt/tiny/heads/train-gone-0-0123456789abcdef/state.pt",
    }
    for name in theirs | stale:
        put(name)
    prune.show(STUDY, [heads], delete_too=True)
    assert files() == {*NEEDED, *theirs}
    with pytest.raises(StudyError, match="together with the study"):
        prune.show(heads, delete_too=True)
    prune.show(STUDY, delete_too=True)
    assert files() == set(NEEDED)


def test_what_an_experiment_with_data_of_its_own_needs_stays() -> None:
    digits = STUDY.model_copy(update={"name": "tiny/digits", "runs": {"copy_digits": STUDY.runs["run"]}})
    digits._own_sections = ("data",)
    assert digits.cached_teachers == ("first",)
    theirs = {
        "runs/tiny/experiments/digits/data/train_images.npy",
        "runs/tiny/experiments/digits/splits/labelled.txt",
        "runs/tiny/experiments/digits/cache/first/manifest.json",
        "runs/tiny/experiments/digits/students/copy_digits/0/model.safetensors",
        "metrics/tiny/data/digits/run.json",
        "metrics/tiny/split/digits/run.json",
        "metrics/tiny/cache/digits/first/run.json",
        ".ckpt/tiny/digits/cache-digits-first-0123456789abcdef/done",
        ".ckpt/tiny/digits/split-digits-0123456789abcdef/done",
    }
    stale = {
        "runs/tiny/experiments/digits/cache/second/manifest.json",
        "metrics/tiny/cache/digits/second/run.json",
        "metrics/tiny/split/gone/run.json",
    }
    for name in theirs | stale:
        put(name)
    prune.show(STUDY, [digits], delete_too=True)
    assert files() == {*NEEDED, *theirs}
    prune.show(STUDY, delete_too=True)
    assert files() == set(NEEDED)


def test_bytes_are_those_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    put("runs/tiny/students/gone/0/model.safetensors", 2_000_000)
    put("runs/tiny/students/gone/1/config.json", 500_000)
    stale = found()["runs/tiny/students/gone"]
    assert (stale.bytes, stale.shared) == (2_500_000, 0)
    prune.show(STUDY, delete_too=False)
    said = capsys.readouterr().out
    assert "would delete runs/tiny/students/gone: 2.500 MB, params.yaml needs it no longer" in said
    assert "1 in all, 2.500 MB" in said
    assert "add --delete" in said


def test_what_dvc_holds_too_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    path = put("runs/tiny/students/gone/0/model.safetensors", 3_000_000)
    Path(".dvc").mkdir()
    os.link(path, ".dvc/object")
    assert found()["runs/tiny/students/gone"].shared == 3_000_000
    delete_all()
    assert "3.000 MB of that have another name" in capsys.readouterr().out
    assert Path(".dvc/object").stat().st_size == 3_000_000


def test_an_online_study_needs_no_cached_set() -> None:
    online = tiny_study.make_study("copy", {**CHANGES, "attention.source": "online"})
    assert set(found(online)) == {
        "runs/tiny/cache/first/views",
        "runs/tiny/cache/first/.views.lock",
        "runs/tiny/cache/second/test",
    }


def test_a_set_of_other_views_is_stale(folder: Path) -> None:
    changes = {"attention.source": "cache"}
    tiny_study.write_inputs(folder)
    study = tiny_study.make_study("copy", changes)
    for teacher in study.teachers:
        for path in Path(f"runs/tiny/cache/{teacher}").rglob("*"):
            if path.is_file():
                path.unlink()
        for which in ("views", "validation"):
            tiny_study.script("cache").write(tiny_study.make_parts(study), teacher, which)
    cached = "runs/tiny/cache/{}/views"
    assert not {cached.format(name) for name in study.teachers} & set(found(study))
    fewer = found(tiny_study.make_study("copy", {**changes, "views.per_image": 1}))
    flipped = found(tiny_study.make_study("copy", {**changes, "views.flip": 0.1}))
    wider = found(tiny_study.make_study("copy", {**changes, "attention.dtype": "float32"}))
    for name in study.teachers:
        assert "another recipe: keys is" in fewer[cached.format(name)].reason
        assert "views.flip is 0.5, and 0.1 is expected" in flipped[cached.format(name)].reason
        assert "number format" in wider[cached.format(name)].reason
        assert f"runs/tiny/cache/{name}/validation" not in {*fewer, *flipped}
        assert f"runs/tiny/cache/{name}/validation" in wider


def test_of_a_stages_checkpoints_the_newest_stays() -> None:
    newest, older = (f".ckpt/tiny/pretrain-first-{digit * 16}" for digit in "ab")
    for age, name in enumerate((newest, older)):
        put(f"{name}/state.pt")
        os.utime(name, (1e9 - age, 1e9 - age))
    assert set(found()) == {older}


def test_files_of_a_living_process_stay() -> None:
    put(f"runs/tiny/cache/first/views/.tmp-{os.getpid()}-shard-00001.safetensors")
    assert found() == {}


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "run").mkdir(parents=True)
    (outside / "run" / "precious").write_bytes(b"x" * 1000)
    Path("runs/tiny/students/gone").symlink_to(outside)  # a stale name
    Path("runs/tiny/teachers/third").mkdir()
    Path("runs/tiny/teachers/third/weights").symlink_to(outside)  # in a stale folder
    Path("runs/tiny/students/run/0/link").symlink_to(outside)  # in a needed one
    stale = found()
    assert set(stale) == {"runs/tiny/students/gone", "runs/tiny/teachers/third"}
    assert all(entry.bytes < 1000 for entry in stale.values())
    delete_all()
    assert (outside / "run" / "precious").stat().st_size == 1000
    assert not Path("runs/tiny/students/gone").is_symlink()
    assert Path("runs/tiny/students/run/0/link").is_symlink()


@pytest.mark.parametrize("linked", ["runs/tiny", "runs", "runs/tiny/students", ".ckpt", "metrics/tiny"])
def test_a_linked_folder_is_not_entered(
    linked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in STALE:
        put(name)
    outside = tmp_path / "outside"
    Path(linked).rename(outside)
    Path(linked).symlink_to(outside)
    before = {path: path.stat().st_size for path in outside.rglob("*") if path.is_file()}
    delete_all()
    assert {path: path.stat().st_size for path in outside.rglob("*") if path.is_file()} == before
    assert ("left alone" in capsys.readouterr().out) == (linked != "runs/tiny/students")


def test_what_cannot_be_deleted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    put("runs/tiny/resolved/gone.json")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StudyError, match=r"gone\.json: cannot be deleted: Permission denied"):
        delete_all()
