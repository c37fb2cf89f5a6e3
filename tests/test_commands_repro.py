"""Several DVCs at a time, on a real graph of stages that take a moment."""

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
import yaml

from attention_transfer.commands.repro import (
    GPUS,
    LARGEST_BATCH,
    OMP,
    THREADS,
    Clock,
    Queue,
    depth_first,
    family,
    gpus,
    repro,
    surroundings,
)
from attention_transfer.errors import StudyError
from attention_transfer.machine_file import Machine

WIDE = 4
WORK = """
import json, os, pathlib, sys, time
began = time.time()
name = sys.argv[1]
time.sleep(1.0)
text = "".join(pathlib.Path(path).read_text() for path in sys.argv[2:])
if os.environ.get("OMP_NUM_THREADS") != os.environ.get("ATTENTION_TRANSFER_THREADS"): sys.exit(4)
if "bad" in text or pathlib.Path("fail-" + name).exists(): sys.exit(3)
with open("log.jsonl", "a") as log:
    log.write(json.dumps([name, began, time.time(), os.environ.get("ATTENTION_TRANSFER_THREADS")]) + chr(10))
pathlib.Path(name).write_text(text + name)
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """source -> first -> four times train -> last; the last one is in a graph of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(THREADS, raising=False)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True)
    Path("work.py").write_text(WORK)
    Path("source").write_text("s")
    train = {
        "matrix": {"number": list(range(WIDE))},
        "cmd": f"{sys.executable} work.py train-${{item.number}} first",
        "deps": ["first"],
        "outs": ["train-${item.number}"],
    }
    first = {"cmd": f"{sys.executable} work.py first source", "deps": ["source"], "outs": ["first"]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"first": first, "train": train}}))
    deps = [f"train-{number}" for number in range(WIDE)]
    last = {
        "wdir": "..",
        "cmd": f"{sys.executable} work.py last {' '.join(deps)}",
        "deps": deps,
        "outs": ["last"],
    }
    Path("end").mkdir()
    Path("end/dvc.yaml").write_text(yaml.safe_dump({"stages": {"last": last}}))
    return tmp_path


GRAPH = Path("end/dvc.yaml")


def log() -> dict[str, tuple[float, float, str]]:
    """Of each stage that ran: when it began, when it ended, its threads."""
    lines = Path("log.jsonl").read_text().splitlines() if Path("log.jsonl").exists() else []
    found = [json.loads(line) for line in lines]
    assert len({name for name, *_ in found}) == len(found), "a stage ran twice"
    return {name: (began, ended, threads) for name, began, ended, threads in found}


@pytest.mark.slow
def test_stages_run_side_by_side_and_after_what_they_wait_for(repository: Path) -> None:
    assert repro(GRAPH, 2) == 0
    ran = log()
    train = [ran[f"train-{number}"] for number in range(WIDE)]
    assert all(ran["first"][1] <= began and ended <= ran["last"][0] for began, ended, _ in train)
    alive = [sum(began < at < ended for began, ended, _ in train) for at in (m[0] + 1e-3 for m in train)]
    assert max(alive) == 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert {threads for _, _, threads in train} == {str(max(1, cores // 2))}
    assert {ran[name][2] for name in ("first", "last")} == {str(cores)}
    assert Path("last").read_text() == "".join(f"sfirsttrain-{number}" for number in range(WIDE)) + "last"
    locked = [yaml.safe_load(path.read_text())["stages"] for path in (Path("dvc.lock"), Path("end/dvc.lock"))]
    assert [len(stages) for stages in locked] == [1 + WIDE, 1]
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "-q", "dvc.yaml", "end/dvc.yaml"], check=False
    )
    assert status.returncode == 0  # all is up to date
    Path("log.jsonl").unlink()
    assert repro(GRAPH, 2) == 0
    assert log() == {}


@pytest.mark.slow
def test_one_family_runs_with_what_it_depends_on_and_no_more(repository: Path) -> None:
    assert repro(GRAPH, 2, only=["train"]) == 0
    assert set(log()) == {"first", *(f"train-{number}" for number in range(WIDE))}
    with pytest.raises(StudyError, match=r"has no stage 'cache'[\s\S]*first, last, train"):
        repro(GRAPH, 2, only=["cache"])


@pytest.mark.slow
def test_a_family_is_that_of_the_graph_itself(repository: Path) -> None:
    """A study's report waits for its experiments, which have stages of the same names."""
    graph = yaml.safe_load(GRAPH.read_text())
    own = {"wdir": "..", "cmd": f"{sys.executable} work.py own first", "deps": ["first"], "outs": ["own"]}
    graph["stages"]["train"] = own
    GRAPH.write_text(yaml.safe_dump(graph))
    assert repro(GRAPH, 2, only=["train"]) == 0
    assert set(log()) == {"first", "own"}
    assert repro(GRAPH, 2, only=["first", "train", "last"]) == 0  # `first` is another graph's
    assert set(log()) == {"first", "own", "last", *(f"train-{number}" for number in range(WIDE))}


@pytest.mark.slow
def test_a_stage_that_fails_ends_it_and_what_is_done_stays_done(repository: Path) -> None:
    Path("source").write_text("bad")
    assert repro(GRAPH, 2) == 1
    assert log() == {}
    Path("source").write_text("good")
    assert repro(GRAPH, 2) == 0
    assert len(log()) == WIDE + 2


@pytest.mark.slow
def test_where_one_fails_the_others_do_not_go_on_to_their_next_stage(repository: Path) -> None:
    Path("fail-train-0").touch()
    assert repro(GRAPH, 2) != 0
    time.sleep(1.5)  # these stages do not die with their DVC, as the study's do: they end by themselves
    assert len(log()) < WIDE
    assert {"train-0", "last"} & set(log()) == set()
    Path("fail-train-0").unlink()
    Path("log.jsonl").unlink()
    assert repro(GRAPH, 2) == 0
    assert {"train-0", "last"} <= set(log())
    assert Path("last").exists()


def words(process: psutil.Process) -> list[str]:
    """The command line of a process; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def start() -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A repro in a process of its own, as soon as a stage of the train runs; and its DVCs."""
    program = (
        "import pathlib, sys; from attention_transfer.commands.repro import repro;"
        f"sys.exit(repro(pathlib.Path('{GRAPH}'), 2))"
    )
    running = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        below = {process: words(process) for process in psutil.Process(running.pid).children(recursive=True)}
        if any("work.py" in line and "train-" in " ".join(line) for line in below.values()):
            return running, [process for process, line in below.items() if "dvc" in line]
        time.sleep(0.02)
    return pytest.fail("no stage of the train began")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_dvc_outlives_it_and_it_goes_on_where_it_was(number: signal.Signals, repository: Path) -> None:
    running, dvcs = start()
    running.send_signal(number)
    assert running.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    assert dvcs
    assert psutil.wait_procs(dvcs, 30)[1] == []
    time.sleep(1.5)  # these stages do not die with their DVC, as the study's do: they end by themselves
    assert "last" not in log()
    Path("log.jsonl").unlink(missing_ok=True)
    assert repro(GRAPH, 2) == 0
    assert "first" not in log()
    assert "last" in log()


@pytest.mark.slow
def test_what_dvc_cannot_read_is_an_error(repository: Path) -> None:
    with pytest.raises(StudyError, match="does not exist"):
        repro(Path("none/dvc.yaml"), 2)
    GRAPH.write_text("stages: [")
    with pytest.raises(StudyError, match="DVC cannot read it"):
        repro(GRAPH, 2)


def test_a_batch_leaves_work_for_the_others() -> None:
    waiting = {
        "a": set[str](),
        **{f"train@{number}": {"a"} for number in range(40)},
        "evaluate": {"train@3"},
    }
    queue = Queue(waiting, jobs=2, cores=2)
    assert queue.take(0) == ["a"]
    assert queue.take(2) == []
    queue.finish(["a"])
    first = queue.take(0)
    assert len(first) == LARGEST_BATCH
    assert queue.next() == "24 train, evaluate"
    order: list[str] = []
    while taken := queue.take(1):
        assert taken[0] not in first
        order += taken
        queue.finish(taken)
    assert "evaluate" not in order  # train@3 was in the first batch, which is not through
    queue.finish(first)
    assert queue.take(0) == ["evaluate"]
    assert (queue.total, queue.waiting) == (42, {})


def test_students_share_the_cores_and_other_stages_have_all_and_go_alone() -> None:
    waiting = {
        "pretrain@mae": set[str](),
        "pretrain@dino": set(),
        "train@a-0": set(),
        "train@a-1": set(),
        "x:train@b-0": set(),
        "maps": set(),
    }
    queue = Queue(waiting, jobs=2, cores=5)
    assert queue.threads == {"pretrain": 5, "train": 2, "maps": 5}
    assert queue.take(0) == ["pretrain@mae"]  # each takes long, and all cores: not both to one DVC
    assert queue.take(5) == []
    queue.finish(["pretrain@mae"])
    assert queue.take(2) == ["train@a-0"]  # what needs more cores than are free lets others pass
    assert queue.take(2) == ["train@a-1"]
    assert queue.take(4) == []
    assert queue.take(0) == ["pretrain@dino"]
    assert queue.take(0) == ["x:train@b-0"]
    assert queue.take(0) == ["maps"]


def test_one_at_a_time_a_teacher_still_goes_alone() -> None:
    queue = Queue({"pretrain@a": set(), "pretrain@b": set(), "train@a": {"pretrain@a"}}, jobs=1, cores=2)
    assert queue.take(0) == ["pretrain@a"]


def test_short_stages_that_have_all_cores_share_a_start_of_dvc() -> None:
    waiting = {"probe@a": set[str](), "maps": set(), "probe@b": set(), "probe@c": {"pretrain@c"}}
    queue = Queue(waiting, jobs=2, cores=2)
    assert queue.take(0) == ["probe@a", "probe@b"]
    assert queue.take(0) == ["maps"]


def test_predictions_come_right_behind_their_student() -> None:
    waiting: dict[str, set[str]] = {}
    for number in range(4):
        waiting |= {f"train@{number}": set(), f"predict@{number}": {f"train@{number}"}}
    queue = Queue(waiting, jobs=2, cores=2)
    assert queue.take(0) == ["train@0", "predict@0", "train@1", "predict@1"]
    assert queue.take(1) == ["train@2", "predict@2"]
    assert queue.take(1) == ["train@3"]  # the last for whoever is free: its predictions when it is through
    assert queue.take(1) == []
    queue.finish(["train@3"])
    assert queue.take(1) == ["predict@3"]


def study_graph(teachers: str, seeds: int) -> dict[str, set[str]]:
    """As dvc.yaml has it, of runs that use a teacher each; by breadth: stages of a family stand together."""
    grid = [f"{teacher}-{seed}" for teacher in teachers for seed in range(seeds)]
    return {
        "data": set(),
        "split": {"data"},
        "shifts": {"data"},
        **{f"pretrain@{teacher}": {"data", "split"} for teacher in teachers},
        **{f"cache@{teacher}": {"data", "split", f"pretrain@{teacher}"} for teacher in teachers},
        **{f"resolve@{teacher}": {f"pretrain@{teacher}", f"cache@{teacher}"} for teacher in teachers},
        **{f"train@{each}": {"data", "split", f"resolve@{each[0]}"} for each in grid},
        **{f"predict@{each}": {"data", "shifts", f"resolve@{each[0]}", f"train@{each}"} for each in grid},
        "evaluate": {f"predict@{each}" for each in grid},
        "report": {"evaluate", "shifts", *(f"pretrain@{teacher}" for teacher in teachers)},
    }


def test_a_teacher_is_followed_by_what_waits_for_it() -> None:
    waits = study_graph("ab", seeds=2)
    ordered = depth_first(waits)
    assert ordered == waits
    assert [*ordered] == [
        *("data", "shifts", "split"),
        *("pretrain@a", "cache@a", "resolve@a", "train@a-0", "predict@a-0", "train@a-1", "predict@a-1"),
        *("pretrain@b", "cache@b", "resolve@b", "train@b-0", "predict@b-0", "train@b-1", "predict@b-1"),
        *("evaluate", "report"),
    ]


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_no_stage_begins_before_what_it_waits_for(jobs: int) -> None:
    waits = study_graph("abc", seeds=5)
    queue = Queue(depth_first(waits), jobs=jobs, cores=2)
    done: set[str] = set()
    at_work: list[list[str]] = []
    while queue.waiting or at_work:
        busy = sum(queue.threads[family(batch[0])] for batch in at_work)
        if len(at_work) < jobs and (batch := queue.take(busy)):
            for number, stage in enumerate(batch):
                assert waits[stage] <= done | set(batch[:number])
            at_work.append(batch)
            continue
        batch = at_work.pop(0)
        done |= set(batch)
        queue.finish(batch)
    assert done == waits.keys()


@pytest.mark.parametrize(("jobs", "cores"), [(4, 2), (1, 8), (3, 3), (2, 1)])
def test_every_stage_has_its_turn_whatever_the_cores(jobs: int, cores: int) -> None:
    queue = Queue({f"{kind}@{n}": set() for kind in "ab" for n in range(5)} | {"c": {"a@1"}}, jobs, cores)
    done = 0
    while taken := queue.take(0):
        queue.finish(taken)
        done += len(taken)
    assert done == queue.total == 11


def test_the_estimate_is_of_the_families_that_were_measured() -> None:
    clock, stages = Clock(), ["studies/x/dvc.yaml:train@a-0", "train@b-0", "predict@a-0"]
    assert [family(stage) for stage in stages] == ["train", "train", "predict"]
    assert clock.left(stages, 2) == "no estimate yet"
    clock.add("train@c-0", 500.0)
    clock.add("train@c-1", 700.0)
    assert clock.left(stages, 2) == "at least 10 min to go"
    clock.add("predict@c-1", 120.0)
    assert clock.left(stages, 2) == "about 11 min to go"
    clock.add("maps", 240.0)  # has all cores for itself
    assert clock.left([*stages, "maps"], 2) == "about 15 min to go"
    assert clock.left([], 2) == "all done"


def test_each_of_several_dvcs_has_gpus_of_its_own() -> None:
    devices = ["0", "1", "2", "3", "4"]
    alone = [surroundings(Machine(), number, ["train@a-0"], 4, devices) for number in (1, 2, 5, 6)]
    assert [found[GPUS] for found in alone] == ["0", "1", "4", "0"]
    pairs = [surroundings(Machine(processes=2), number, ["train@a-0"], 4, devices) for number in (1, 2, 3)]
    assert [found[GPUS] for found in pairs] == ["0,1", "2,3", "0,1"]
    assert GPUS not in surroundings(
        Machine(processes=8), 1, ["train@a-0"], 4, devices
    )  # the launcher refuses
    assert GPUS not in surroundings(Machine(), 1, ["train@a-0"], 4, [])
    assert surroundings(Machine(launcher="slurm"), 1, ["train@a-0"], 4, devices) == {}


def test_the_processes_of_a_stage_share_its_threads() -> None:
    def threads(machine: Machine, stage: str) -> str:
        found = surroundings(machine, 1, [stage], 4, [])
        assert found[THREADS] == found[OMP]
        return found[THREADS]

    assert threads(Machine(), "train@a-0") == "4"
    assert threads(Machine(processes=2), "x:train@a-0") == "2"
    assert threads(Machine(processes=8), "cache@mae") == "1"
    assert threads(Machine(processes=2), "maps") == "4"  # which is not shared out
    assert threads(Machine(processes=2, threads=3), "cache@mae") == "3"


def test_gpus_are_those_that_the_environment_or_the_driver_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(GPUS, raising=False)
    assert gpus() == []
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 0\necho 1\necho 2\n")
    driver.chmod(0o755)
    assert gpus() == ["0", "1", "2"]
    monkeypatch.setenv(GPUS, "GPU-5,7")
    assert gpus() == ["GPU-5", "7"]
    monkeypatch.setenv(GPUS, "")
    assert gpus() == []
    monkeypatch.delenv(GPUS)
    driver.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert gpus() == []
