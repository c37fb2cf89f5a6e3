"""A stage as a job: on submitit's local executor, and on a SLURM whose commands are stand-ins on PATH."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from attention_transfer import cluster
from attention_transfer.errors import StudyError
from attention_transfer.machine_file import Machine

PROGRAM = """
import os, pathlib, signal, sys, time
here = pathlib.Path.cwd()
with (here / "begun").open("a") as file: file.write(f"{os.getpid()}\\n")
print("to the log", flush=True)
def stop(number, frame):
    (here / "saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
while sys.argv[2] == "waits" and not (here / "saved").exists(): time.sleep(0.02)
sys.exit(int(sys.argv[1]))
"""
# Jobs are processes here; a job's script calls srun, which runs its command with the job's logs.
SLURM = {
    "sbatch": """
import os, pathlib, subprocess, sys
place = pathlib.Path(os.environ["FAKE_SLURM"])
script = pathlib.Path(sys.argv[-1]).read_text()
nodes = int(script.partition("--nodes=")[2].split()[0])
(place / "script").write_text(script)
with (place / "calls").open("a") as calls: calls.write("sbatch" + chr(10))
subprocess.Popen(["bash", str(place / "script")], start_new_session=True,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    env={**os.environ, "SLURM_JOB_ID": "12", "SLURM_NTASKS": str(nodes), "SLURM_JOB_NUM_NODES": str(nodes),
         "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes)})
print("Submitted batch job 12")
""",
    "srun": """
import os, pathlib, subprocess, sys
place, options, rest = pathlib.Path(os.environ["FAKE_SLURM"]), {}, sys.argv[1:]
while rest and rest[0].startswith("-"):
    name = rest.pop(0)
    if name in ("--output", "--error"):
        options[name] = rest.pop(0)
jobs = []
for task in range(int(os.environ["SLURM_NTASKS"])):
    logs = {name: open(file.replace("%j", "12").replace("%t", str(task)), "ab") for name, file in options.items()}
    jobs.append(subprocess.Popen(rest, stdout=logs["--output"], stderr=logs.get("--error"),
        env={**os.environ, "SLURM_PROCID": str(task), "SLURM_NODEID": str(task)}))
(place / "pid").write_text(str(jobs[0].pid))
sys.exit(max(job.wait() for job in jobs))
""",
    "sacct": """
import os, pathlib
place = pathlib.Path(os.environ["FAKE_SLURM"])
print("JobID|State|NodeList" + chr(10) + "12|" + (place / "state").read_text() + "|here")
""",
    "scancel": """
import os, pathlib, signal, sys
place = pathlib.Path(os.environ["FAKE_SLURM"])
with (place / "calls").open("a") as calls: calls.write("scancel" + chr(10))
os.killpg(os.getpgid(int((place / "pid").read_text())), signal.SIGTERM)
""",
    "scontrol": """
import os, pathlib, subprocess, sys
place = pathlib.Path(os.environ["FAKE_SLURM"])
with (place / "calls").open("a") as calls: calls.write(" ".join(sys.argv[1:]) + chr(10))
subprocess.Popen(["bash", str(place / "script")], start_new_session=True,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
""",
}


NODE = """
import sys
from attention_transfer import launching
from attention_transfer.machine_file import Machine
machine = Machine(device="cpu", processes=int(sys.argv[1]))
sys.exit(launching.launch(machine, [sys.executable, "worker.py", sys.argv[2]]) if launching.is_wanted(machine) else 9)
"""
WORKER = """
import os, sys, torch
from pathlib import Path
from attention_transfer import processes
processes.join(torch.device("cpu"))
number, count = processes.number(), processes.count()
assert processes.collected(number) == list(range(count))
Path(f"rank-{number}").write_text(f"{count} {os.environ['LOCAL_RANK']}")
code = int(sys.argv[1])
if code and number == count - 1: sys.exit(code)
processes.collected(number)
processes.part()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("submitit", reason="needs the optional package submitit: pip install -e .[slurm]")
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.1)
    return tmp_path


@pytest.fixture
def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = folder / "slurm"
    place.mkdir()
    for name, text in SLURM.items():
        command = place / name
        command.write_text(f"#!{sys.executable}\n{text}")
        command.chmod(0o755)
    (place / "state").write_text("RUNNING")
    monkeypatch.setenv("FAKE_SLURM", str(place))
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place


def run(name: str, code: int = 0, what: str = "ends", machine: Machine | None = None) -> int:
    command = [sys.executable, "program.py", str(code), what]
    return cluster.run(machine or Machine(), command, label="train-a-0", folder=Path("logs"), cluster=name)


def calls(slurm: Path) -> list[str]:
    return (slurm / "calls").read_text().splitlines()


def begun(folder: Path) -> list[int]:
    file = folder / "begun"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("name", ["local", "slurm"])
def test_a_job_ends_as_its_stage_does_and_its_log_is_shown(
    name: str, code: int, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(slurm={"slurm_partition": "some", "timeout_min": 7} if name == "slurm" else {})
    assert run(name, code, machine=machine) == code
    told = capfd.readouterr()
    assert told.err.count("to the log") == 1
    assert "train-a-0: job " in told.out
    if name == "slurm":
        assert calls(slurm) == ["sbatch"]
        script = (slurm / "script").read_text()
        assert "#SBATCH --partition=some" in script
        assert "#SBATCH --time=7" in script
        assert "#SBATCH --job-name=train-a-0" in script


@pytest.mark.slow
def test_the_launchers_of_two_nodes_meet(
    folder: Path, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One after the other: the job's number, which is always 12 here, decides the port."""
    (folder / "node.py").write_text(NODE)
    (folder / "worker.py").write_text(WORKER)
    for each, code in ((1, 0), (2, 5)):
        command = [sys.executable, "node.py", str(each), str(code)]
        found = cluster.run(Machine(slurm={"nodes": 2}), command, label="two", folder=Path(f"logs-{each}"))
        ranks = {path.name: path.read_text() for path in folder.glob("rank-*")}
        assert ranks == {f"rank-{number}": f"{2 * each} {number % each}" for number in range(2 * each)}
        assert (found == 0) == (code == 0)
        assert "#SBATCH --nodes=2" in (slurm / "script").read_text()
        told = capfd.readouterr().err
        assert (f"error: process {2 * each - 1} of {2 * each} ended with exit code 5" in told) == (code == 5)


@pytest.mark.slow
def test_what_one_process_must_do_gets_one_node(folder: Path, slurm: Path) -> None:
    command = [sys.executable, "program.py", "0", "ends"]
    assert (
        cluster.run(Machine(slurm={"nodes": 2}), command, label="x", folder=Path("logs"), one_node=True) == 0
    )
    assert "#SBATCH --nodes=1" in (slurm / "script").read_text()
    assert len(begun(folder)) == 1


@pytest.mark.slow
def test_a_preempted_job_saves_its_state_and_goes_back_to_the_queue(folder: Path, slurm: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from attention_transfer import cluster;"
        "from attention_transfer.machine_file import Machine;"
        "sys.exit(cluster.run(Machine(), [sys.executable, 'program.py', '4', 'waits'], label='x', folder=Path('logs')))"
    )
    waiting = subprocess.Popen([sys.executable, "-c", program])
    job = wait_for_job(folder, slurm)
    for process in (job, *job.children(recursive=True)):  # as SLURM does: every process of the job
        process.send_signal(signal.SIGUSR2)
    assert waiting.wait(60) == 4  # of the second time, which finds the state of the first
    assert (folder / "saved").exists()
    assert len(begun(folder)) == 2
    assert calls(slurm) == ["sbatch", "requeue 12"]


@pytest.mark.slow
def test_a_stop_signal_cancels_the_job(folder: Path, slurm: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from attention_transfer import cluster;"
        "from attention_transfer.machine_file import Machine;"
        "sys.exit(cluster.run(Machine(), [sys.executable, 'program.py', '4', 'waits'], label='x', folder=Path('logs')))"
    )
    waiting = subprocess.Popen([sys.executable, "-c", program])
    job = wait_for_job(folder, slurm)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(60) == 128 + signal.SIGTERM
    assert calls(slurm) == ["sbatch", "scancel"]
    deadline = time.monotonic() + 30
    while not (folder / "saved").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (folder / "saved").exists()
    job.kill()  # as SLURM does after its grace period


def wait_for_job(folder: Path, slurm: Path) -> psutil.Process:
    """submitit's process on the node, as soon as the stage has begun."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        if begun(folder):
            time.sleep(0.3)  # until the stage has its handler
            return psutil.Process(int((slurm / "pid").read_text()))
        time.sleep(0.05)
    return pytest.fail("the job did not begin")


@pytest.mark.slow
def test_a_job_that_is_lost_is_an_error(
    folder: Path, slurm: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm / "srun").write_text("#!/bin/sh\nexit 1\n")
    (slurm / "state").write_text("FAILED")
    assert run("slurm") == 1
    assert "error: job 12 of train-a-0 has not done its work" in capfd.readouterr().err


def test_what_is_not_there_or_not_known_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match=r"submitit refuses its parameters: .*nonsense") as caught:
        run("local", machine=Machine(slurm={"nonsense": 1}))
    assert caught.value.where == "machine.yaml: slurm"
    with pytest.raises(
        StudyError, match="tasks_per_node is 8, but a stage starts its processes on a node itself"
    ):
        run("local", machine=Machine(slurm={"tasks_per_node": 8}))
    monkeypatch.setenv("PATH", str(folder))
    assert shutil.which("srun") is None
    with pytest.raises(StudyError, match="the job was not accepted"):
        run("slurm")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(StudyError, match="the package submitit is not installed") as caught:
        cluster.run(Machine(), ["true"], label="x", folder=tmp_path)
    assert "[slurm]" in caught.value.remedy
