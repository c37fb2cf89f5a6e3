"""One process or two, one pass or several, activations kept or not: the same gradients, weights and predictions.

Two processes work through all cases in one go (working_together.py); this one then computes each case alone, whole.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import torch
import working_together as work
from torch import Tensor, nn

from attention_transfer import processes
from attention_transfer.machine_file import PROCESS, Machine
from attention_transfer.training import execution
from attention_transfer.training.checkpoint import Checkpoint

pytestmark = pytest.mark.slow  # starting the processes takes seconds

LAUNCH = (
    "import sys; from attention_transfer.launching import launch; from attention_transfer.machine_file import Machine;"
    "sys.exit(launch(Machine(device='cpu', processes=2), [sys.executable, *sys.argv[1:]]))"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny_study.write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", LAUNCH, work.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert PROCESS not in os.environ
    outcomes: dict[str, Any] = torch.load(folder / "outcomes.pt")
    return outcomes


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor, against the size of all of its kind: a gradient of zero has no scale of its own."""
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    scale = max(float(value.abs().max()) for value in expected.values())
    return {name: float((found[name] - expected[name]).abs().max()) / scale for name in expected}


ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6}
IN_BFLOAT16 = 0.02  # which has eight bits
# Their distances are taken in float32, whatever the model's format.
LOSS_IN_FLOAT32 = ("distill_features", "distill_logits", "distill values", "supervised")


def rounding(name: str) -> float:
    if name in work.IN_BFLOAT16:
        return IN_BFLOAT16
    return ROUNDING[torch.float32 if name.startswith(LOSS_IN_FLOAT32) else work.TOGETHER[name].dtype]


def alone(case: work.Case) -> work.Case:
    return replace(case, machine=Machine())


@pytest.mark.parametrize("name", work.TOGETHER)
def test_two_processes_have_the_gradients_of_one(name: str, together: dict[str, Any], inside: Path) -> None:
    case = work.TOGETHER[name]
    found, expected = together["gradients"][name], work.gradients(alone(case))
    worst = max(differences(found, expected).items(), key=lambda item: item[1])
    assert worst[1] <= rounding(name), worst
    assert any(value.abs().max() > 1e-3 for key, value in expected.items() if key.startswith("1 "))


@pytest.mark.parametrize("name", work.TRAINED)
def test_two_processes_train_to_the_weights_of_one(name: str, together: dict[str, Any], inside: Path) -> None:
    found, expected = together["weights"][name], work.weights(alone(work.TRAINED[name]))
    worst = max(differences(found, expected).items(), key=lambda item: item[1])
    assert worst[1] <= 1e-9, worst  # Adam divides by gradients that may be small


@pytest.mark.parametrize("name", work.RESUMED)
def test_two_processes_go_on_to_the_same_bits(name: str, together: dict[str, Any], folder: Path) -> None:
    assert (folder / "stopped" / name / "state.pt").exists()
    found, expected = together["resumed"][name], together["weights"][name]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_one_process_goes_on_where_two_that_shared_the_weights_stopped(
    together: dict[str, Any], folder: Path, inside: Path
) -> None:
    name = "distill with an average, sharded"
    found = work.weights(alone(work.TRAINED[name]), Checkpoint(folder / "stopped" / name))
    assert max(differences(found, together["weights"][name]).values()) <= 1e-9


@pytest.mark.parametrize("name", [*work.MANY_PASSES, *work.CHECKPOINTED])
def test_passes_and_checkpoints_of_one_process_change_no_gradient(name: str, inside: Path) -> None:
    case = work.TOGETHER[name]
    assert max(differences(work.gradients(case), work.gradients(alone(case))).values()) <= rounding(name)


@pytest.mark.parametrize("count", work.COUNTS)
def test_every_example_is_predicted_once_and_in_its_place(count: int, together: dict[str, Any]) -> None:
    logits, asked = together["predicted"][count]
    assert sorted(row for rows in asked for row in rows) == list(range(count))
    expected, _ = work.predicted(count)
    assert torch.equal(logits, expected)
    assert logits[:, 0].tolist() == list(range(count))


def test_two_processes_write_the_cache_of_one_to_the_byte(together: dict[str, Any], inside: Path) -> None:
    written = work.write_cache(Path("caches") / "alone")
    files = {
        path.relative_to("caches/alone"): path.read_bytes() for path in Path("caches/alone").rglob("*.*")
    }
    assert len([path for path in files if path.name.startswith("shard")]) > 4
    assert files == {
        path.relative_to("caches/together"): path.read_bytes()
        for path in Path("caches/together").rglob("*.*")
    }
    assert written == together["cache"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own look
@pytest.mark.parametrize("name", ["scratch", "distill, stochastic depth, in passes", "distill_features"])
def test_compiled_students_have_the_gradients_of_eager_ones(
    name: str, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As graphs, not as machine code, which takes a minute each and is tested in test_models_attention_modes.py."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    case = replace(work.TOGETHER[name], dtype=torch.float32)
    torch._dynamo.reset()
    compiled = replace(case, machine=replace(case.machine, compile=True))
    found = work.gradients(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    torch._dynamo.reset()
    assert max(differences(found, work.gradients(alone(case))).values()) <= 1e-5


def test_what_is_spread_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    machine = Machine(sharding="fsdp", compile=True)
    how = execution.choose(machine, batch=8, pairs=False, called="whole", shardable=True, where="")
    assert how.paths(torch.device("cpu")) == {
        "processes": "2 by gloo", "sharding": "fsdp", "compile": "no: the weights are spread over the processes",
    }  # fmt: skip


def test_the_record_tells_how_a_training_ran(inside: Path) -> None:
    machine = Machine(micro_batch=3, compile=True, checkpointing=True)
    _, how = work.task(work.Case("linear_probe", machine=machine))
    assert how.paths(torch.device("cpu")) == {
        "passes": "3 of up to 3 images", "compile": "blocks", "checkpointing": "blocks",
    }  # fmt: skip
    _, how = work.task(work.Case("linear_probe"))
    assert how.paths(torch.device("cpu")) == {}
    for case, why in (("linear_probe", "no: one process"), ("mae", "no: not a student")):
        _, how = work.task(work.Case(case, machine=Machine(sharding="fsdp")))
        assert how.paths(torch.device("cpu")) == {"sharding": why}
