"""machine.yaml and the environment: which wins, and what is wrong with a value."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention_transfer.errors import StudyError
from attention_transfer.machine_file import FILE, PREFIX, Machine, settings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for name in vars(Machine()):
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)
    return tmp_path


def test_without_a_file_all_is_as_ever() -> None:
    assert settings() == Machine()
    assert Machine().choices() == {}


@pytest.mark.parametrize("text", ["", "# nothing\n", "threads:\n"])
def test_what_is_empty_says_nothing(text: str, folder: Path) -> None:
    (folder / FILE).write_text(text)
    assert settings() == Machine()


def test_the_file_is_read_and_the_environment_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / FILE).write_text(
        "device: cuda\nprocesses: 8\nmicro_batch: 64\ncompile: true\ncheckpointing: true\nsharding: fsdp\n"
        "launcher: slurm\nslurm:\n  slurm_partition: gpu\n"
    )
    assert settings().choices() == {
        "device": "cuda", "processes": 8, "micro_batch": 64, "compile": True, "checkpointing": True, "sharding": "fsdp",
        "launcher": "slurm", "slurm": {"slurm_partition": "gpu"},
    }  # fmt: skip
    for name, text in {"processes": "2", "compile": "false", "threads": "3"}.items():
        monkeypatch.setenv(PREFIX + name.upper(), text)
    found = settings()
    assert (found.processes, found.compile, found.threads) == (2, False, 3)
    assert found.micro_batch == 64


def test_the_file_of_the_repository_counts_where_dvc_works_in_a_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / FILE).write_text("processes: 3\n")
    (folder / "copy").mkdir()
    monkeypatch.chdir(folder / "copy")
    assert settings().processes == 1
    monkeypatch.setenv("DVC_ROOT", str(folder))
    assert settings().processes == 3


@pytest.mark.parametrize(
    ("text", "problem", "where"),
    [
        ("procesess: 2", "'procesess' is no key of this file", FILE),
        ("processes: 0", "0 is not a number of processes", f"{FILE}: processes"),
        ("processes: 2.0", "2.0 is not a number of processes", f"{FILE}: processes"),
        ("processes: true", "True is not a number of processes", f"{FILE}: processes"),
        ("micro_batch: -4", "-4 is not a number of images in a pass", f"{FILE}: micro_batch"),
        ("compile: 1", "1 is neither true nor false", f"{FILE}: compile"),
        ("launcher: [slurm]", "is no launcher", f"{FILE}: launcher"),
        ("slurm: gpu", "'gpu' are no keys and values", f"{FILE}: slurm"),
        ("- processes", "holds no keys", FILE),
        ("processes: [", "cannot be read", FILE),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str, where: str, folder: Path) -> None:
    (folder / FILE).write_text(text)
    with pytest.raises(StudyError) as caught:
        settings()
    assert problem in caught.value.problem
    assert caught.value.where.endswith(where)
    assert caught.value.remedy


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}CHECKPOINTING", "perhaps")
    with pytest.raises(StudyError, match="'perhaps' is neither true nor false") as caught:
        settings()
    assert caught.value.where == "environment variable ATTENTION_TRANSFER_CHECKPOINTING"
