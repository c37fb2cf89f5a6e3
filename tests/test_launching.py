"""A stage on two processes: started by itself, ended as one, resumed to the same bits, with one error message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from attention_transfer import launching
from attention_transfer.errors import StudyError
from attention_transfer.machine_file import Machine

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "presets" / "smoke.yaml"
STEPS = 60
SCRIPT = """
from attention_transfer.stage import Stage, run_script, shared_out

import os
import time
from pathlib import Path

import torch

from attention_transfer import processes
from attention_transfer.config import Run
from attention_transfer.errors import StudyError
from attention_transfer.training import machine
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.division import divide
from attention_transfer.training.loop import fit

HOW = os.environ.get("HOW", "")


class Task:
    def __init__(self):
        torch.manual_seed(0)
        self.model, self.steps_per_epoch = torch.nn.Linear(6, 3), 12

    def train(self):
        self.model.train()

    def losses(self, epoch, step, part):
        if HOW == "slow":
            Path(f"working-{processes.number()}").write_text(str(os.getpid()))
            time.sleep(0.1)
        if HOW == "error" and processes.number() == 1 and step == 3:
            raise StudyError("was wrong", where="here", remedy="mend it")
        inputs = torch.randn(9, 6, generator=torch.Generator().manual_seed(100 * epoch + step))[part]
        return {"total": (self.model(inputs) - inputs[:, :3].sin()).square().mean()}

    def validate(self, model):
        return {}


def main(this: Stage) -> None:
    machine.prepare()
    recipe = Run(method="scratch", teacher="mae", learning_rate=0.01, epochs=5, warmup_epochs=1, batch_size=9)

    def work():
        among = processes.count()
        division = divide(9, process=processes.number(), among=among, micro_batch=None, pairs=False, where="")
        model, history = fit(
            Task(), recipe, seed=0, clip_norm=None, validate_every=1, checkpoint=Checkpoint(this.checkpoints()),
            sink=this.tracker, label="example", where="", division=division,
        )
        if this.writes:
            torch.save([model.state_dict(), history.rows], "outcome.pt")
        return {"steps": history.steps}

    this.run(params={}, inputs={}, work=work, live=False)


run_script("example", main, __file__, shared_out)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "machine.yaml").write_text("device: cpu\nprocesses: 2\n")
    return tmp_path


def begin(folder: Path, how: str = "") -> subprocess.Popen[str]:
    for left in folder.glob("working-*"):
        left.unlink()
    return subprocess.Popen(
        [sys.executable, "script.py", "--params", str(SMOKE)],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "DVC_STAGE"} | {"HOW": how},
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(folder: Path) -> list[psutil.Process]:
    """Of a slow stage, as soon as both have begun."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        files = sorted(folder.glob("working-*"))
        if len(files) == 2 and all(file.read_text() for file in files):
            return [psutil.Process(int(file.read_text())) for file in files]
        time.sleep(0.05)
    return pytest.fail("the stage did not begin")


def end(running: subprocess.Popen[str]) -> tuple[int, str]:
    _, told = running.communicate(timeout=240)
    return running.returncode, told


def outcome(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    weights, rows = torch.load(folder / "outcome.pt")
    (folder / "outcome.pt").unlink()
    return weights, rows


@pytest.mark.slow
def test_whoever_is_killed_all_end_and_the_same_command_goes_on_to_the_same_bits(folder: Path) -> None:
    assert end(begin(folder))[0] == 0
    weights, rows = outcome(folder)
    record = json.loads(next(folder.glob("metrics/smoke/example/run.json")).read_text())
    assert record["machine"]["processes"] == 2
    assert not list(folder.glob(".ckpt/**/state.pt"))

    running = begin(folder, "slow")  # asked to stop: all save their state and end
    started = workers(folder)
    running.send_signal(signal.SIGTERM)
    assert end(running)[0] == 128 + signal.SIGTERM
    assert psutil.wait_procs(started, 30)[1] == []
    assert list(folder.glob(".ckpt/**/state.pt"))

    running = begin(folder, "slow")  # one of them is killed: the other ends too
    started = workers(folder)
    started[1].kill()
    code, told = end(running)
    assert code == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was ended by SIGKILL; the same command goes on" in told
    assert psutil.wait_procs(started, 30)[1] == []

    running = begin(folder, "slow")  # their parent is killed: they save their state and end
    started = workers(folder)
    running.kill()
    assert psutil.wait_procs(started, 60)[1] == []
    running.communicate()

    assert end(begin(folder))[0] == 0
    resumed, curve = outcome(folder)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert curve == rows


@pytest.mark.slow
def test_the_error_of_one_process_ends_the_stage_and_is_told_once(folder: Path) -> None:
    code, told = end(begin(folder, "error"))
    assert code == 1
    assert told.count("error: here: was wrong\n  What to do: mend it") == 1
    assert "Traceback" not in told
    assert not list(folder.glob("outcome.pt"))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(StudyError, match="processes is 3, but there are 2 GPUs"):
        launching.launch(Machine(processes=3), ["true"])
    with pytest.raises(StudyError, match="device mps has room for one"):
        launching.launch(Machine(processes=3, device="mps"), ["true"])
