"""Where it runs comes from the environment, and what is wrong there is explained."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from attention_transfer.errors import StudyError
from attention_transfer.training import machine


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.delenv(machine.DEVICE, raising=False)
    monkeypatch.delenv(machine.THREADS, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_cpu_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.DEVICE, "cpu")
    assert machine.device() == torch.device("cpu")
    assert machine.prepare() == torch.device("cpu")


@pytest.mark.parametrize("available", [False, True], ids=["no_gpu", "gpu"])
def test_without_a_choice_a_gpu_if_there_is_one(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert machine.device() == torch.device("cpu")
    elif torch.cuda.is_available():
        assert machine.device().type == "cuda"
    else:  # it is chosen, and found missing
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(StudyError, match="'cuda' is not a device"):
            machine.device()


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "1.5"])
def test_a_device_that_does_not_exist_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.DEVICE, name)
    with pytest.raises(StudyError, match=f"'{name}' is not a device of this machine") as caught:
        machine.prepare()
    assert machine.DEVICE in caught.value.where
    assert "cpu" in caught.value.remedy


@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5", " 2", "²"])
def test_a_number_of_threads_that_is_none_is_refused(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.DEVICE, "cpu")
    monkeypatch.setenv(machine.THREADS, threads)
    with pytest.raises(StudyError, match="is not a number of threads") as caught:
        machine.prepare()
    assert repr(threads) in str(caught.value)
    assert machine.THREADS in caught.value.where


def test_threads_and_determinism_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.DEVICE, "cpu")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    for threads in ("3", "2"):
        monkeypatch.setenv(machine.THREADS, threads)
        machine.prepare()
        assert torch.get_num_threads() == int(threads)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators are left as they are")
def test_a_step_reuses_the_memory_of_the_step_before() -> None:
    """In a process of its own, as the allocator is the whole process's."""
    program = (
        "import resource, sys, torch\n"
        "from attention_transfer.training import machine\n"
        "if sys.argv[1] == 'prepared': machine.prepare()\n"
        "def step(): return [torch.ones(10_000_000) for _ in range(3)]\n"
        "for _ in range(3): step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", program, how],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, machine.DEVICE: "cpu"},
            ).stdout
        )
        for how in ("prepared", "as it comes")
    }
    assert 10 * faults["prepared"] < faults["as it comes"]
