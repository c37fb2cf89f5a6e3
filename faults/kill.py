"""Kills the smoke study again and again until it is through, and compares it with one that nobody disturbed.

    python faults/kill.py FOLDER [--kills 100] [--seed 0] [--stages train,cache] [--small] [--jobs 2]

Two copies of this repository are made in FOLDER. In one the study runs undisturbed; in the other a
signal ends it, at a random moment of a stage or inside of a write, and it is started again, until every family of
stages has had its share of the kills. Then weights, predictions, cache and metrics of the two must be equal to
the bit, and nothing may be left behind: no process, no lock, no temporary file, no run that MLflow takes for alive.

With --jobs both run as `make study` does, several stages at a time, and are struck at random moments, whatever is at
work then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[1]
GRAPH, PARAMS = "studies/smoke/dvc.yaml", "presets/smoke.yaml"
FAMILIES = (
    *("data", "split", "pretrain", "probe", "finetuned", "cache", "resolve"),
    *("train", "shifts", "predict", "maps", "similarity", "evaluate", "report"),
)
MARK = "ATTENTION_TRANSFER_FAULTS"  # in the environment of every process of one start
PATIENCE = 60.0  # seconds that a killed run may take to end
USUAL = 5.0  # seconds of a stage that the undisturbed run found done
TEMPORARY = (".ckpt", "runs", "metrics", "reports")
TARGETS = ("dvc", "stage", "group")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Kill:
    """One kill: in which stage, when (`moment`, inside a `write`, at the `lock` file), what, and how."""

    stage: str
    when: str
    target: str
    signal: str
    seconds: float


class Study:
    """A clone in which the smoke study runs, or with `small` a part of it."""

    def __init__(self, folder: Path, *, small: bool = False) -> None:
        self.folder = folder
        if not folder.exists():
            subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
            changed = ["git", "ls-files", "--modified", "--others", "--exclude-standard"]
            listed = subprocess.run(changed, cwd=ROOT, check=True, capture_output=True, text=True)
            for name in filter(lambda name: (ROOT / name).exists(), listed.stdout.splitlines()):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        if small:
            # Each DVC would read the graphs, and each `sync` bring in the records: for seconds, and for a minute.
            graphs = (f"studies/{name}" for name in ("full", "imagenet1k", "tune"))
            for large in (*graphs, *(f"metrics/{name}" for name in ("core", "full", "tune"))):
                shutil.rmtree(folder / large, ignore_errors=True)
            params = yaml.safe_load((folder / PARAMS).read_text())
            params["runs"] = {name: params["runs"][name] for name in ("scratch", "distill")}
            params["evaluation"] |= {"sets": ["validation", "test"]}
            params["teachers"]["mae"] |= {"images": "digits", "epochs": 10}
            params |= {"seeds": [0], "ensembles": {}, "report": None}
            (folder / PARAMS).write_text(yaml.safe_dump(params, sort_keys=False))

    def environment(self, mark: str) -> dict[str, str]:
        # Debian's sh stays between DVC and the stage, unless the command in dvc.yaml sees to it.
        return {**os.environ, "PYTHONPATH": str(self.folder / "src"), "SHELL": "/bin/sh", MARK: mark}

    def start(self, jobs: int = 0) -> Run:
        """As `make study` does: a look at params.yaml and at what a kill has left, then DVC, or several with jobs."""
        self.check()
        return Run(self, jobs)

    def check(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "attention_transfer", "check", "--params", PARAMS],
            cwd=self.folder,
            env=self.environment(""),
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def begin(self, *command: str, mark: str = "", session: bool = False) -> subprocess.Popen[str]:
        """Starts a command in the clone, whose output can be read from `stdout`."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(mark),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=session,
        )

    def temporaries(self) -> set[Path]:
        """Unfinished files."""
        return {path for root in TEMPORARY for path in (self.folder / root).rglob(".tmp-*")}


class Run:
    """One `dvc repro` in a session of its own, or with jobs what starts several."""

    def __init__(self, study: Study, jobs: int = 0) -> None:
        self.study, self.mark = study, uuid.uuid4().hex
        self.output: list[str] = []
        self.stage, self.since = "", time.monotonic()  # the stage that runs, and since when
        self.locking = threading.Event()  # set while DVC writes its lock file
        self.changed = threading.Condition()
        several = (
            sys.executable,
            "-m",
            "attention_transfer",
            "run",
            "--params",
            PARAMS,
            "--jobs",
            str(jobs),
        )
        command = several if jobs else ("dvc", "repro", GRAPH)
        self.process = study.begin(*command, mark=self.mark, session=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            with self.changed:
                if found := re.search(r"Running stage '[^:]*:([^']*)'", line):
                    self.stage, self.since = found[1], time.monotonic()
                    self.locking.clear()
                elif line.startswith("Updating lock file"):
                    self.locking.set()
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    def completed(self) -> Counter[str]:
        """The stages that ended well and are in DVC's lock file, as far as is known now."""
        found = re.findall(r"Running stage '[^:]*:([^']*)'", "".join(self.output))
        return Counter(found if self.process.returncode == 0 else found[:-1])

    def skipped(self) -> set[str]:
        """The stages that DVC took for made."""
        return set(re.findall(r"Stage '[^:]*:([^']*)' didn't change, skipping", "".join(self.output)))

    def stages(self) -> Iterator[str]:
        """Each stage as it begins, until the run ends."""
        seen = ""
        while self.reader.is_alive() or self.stage != seen:
            with self.changed:
                if self.stage == seen:
                    self.changed.wait(timeout=0.5)
                now = self.stage
            if now != seen:
                yield (seen := now)

    def processes(self) -> list[psutil.Process]:
        """Every living process of this start, whatever its parent now is."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def strike(self, target: str, number: signal.Signals) -> bool:
        """Sends the signal; False if what it was for had ended by itself."""
        try:
            match target:
                case "dvc":
                    os.kill(self.process.pid, number)
                case "group":
                    os.killpg(self.process.pid, number)
                case "stage":
                    children = psutil.Process(self.process.pid).children(recursive=True)
                    scripts = [child for child in children if "pipeline/" in " ".join(child.cmdline())]
                    if not scripts:
                        return False
                    scripts[-1].send_signal(number)
        except (ProcessLookupError, psutil.Error):
            return False
        return True

    def end(self) -> int:
        """Waits for the end of all of it: DVC's exit code.

        Raises:
            AssertionError: a process is left over.
        """
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        until = time.monotonic() + PATIENCE
        while left := self.processes():
            assert time.monotonic() < until, f"left over: {[process.cmdline() for process in left]}"
            time.sleep(0.05)
        return code


def harried(study: Study, count: int, jobs: int, seconds: float, seed: int) -> list[Kill]:
    """Strikes the study at random moments, so many times, and lets it end; all parts of it have their turn.

    Args:
        seconds: that it takes if nobody disturbs it.
    """
    chance, kills = random.Random(seed), list[Kill]()
    while True:
        run = study.start(jobs)
        until = run.since + chance.uniform(0.02, 0.25) * seconds
        number, target = chance.choice(SIGNALS), chance.choice(TARGETS)
        more, struck = len(kills) < count, False
        while run.process.poll() is None and not struck:
            time.sleep(0.01)
            # Between two stages there is none to be struck: then the next.
            struck = more and time.monotonic() > until and run.strike(target, number)
        if struck:
            kill = Kill(run.stage, "moment", target, number.name, round(time.monotonic() - run.since, 3))
            kills.append(kill)
            print(f"{len(kills):4} {kill}", flush=True)
        code = run.end()
        assert code == 0 or struck, f"failed by itself:\n{''.join(run.output[-25:])}"
        if code == 0 and struck:
            kills.pop()  # too late: it was through
        if code == 0 and not more:
            return kills
        if code == 0:  # before it had its share
            forget(study, chance.choice(FAMILIES))


def undisturbed(study: Study, jobs: int = 0) -> dict[str, float]:
    """Runs the study through: seconds of a stage, by family."""
    print("undisturbed run", flush=True)
    run, began = study.start(jobs), {}
    for stage in run.stages():
        began[stage] = time.monotonic()
    assert run.end() == 0, "".join(run.output[-20:])
    times = [*began.values(), time.monotonic()]
    lasted: dict[str, list[float]] = {}
    for stage, (start, end) in zip(began, itertools.pairwise(times), strict=True):
        lasted.setdefault(stage.partition("@")[0], []).append(end - start)
    return {family: min(values) for family, values in lasted.items()}


def disturbed(
    study: Study, shares: dict[str, int], lasts: dict[str, float], seed: int
) -> tuple[list[Kill], Counter[str]]:
    """Kills the study until every family has had its share, and lets it end.

    Returns:
        the kills, and how often each stage was completed.
    """
    chance, kills, done, completed = random.Random(seed), [], Counter[str](), Counter[str]()
    kill: Kill | None = None
    while True:
        before, kill = kill, None
        run = study.start()
        for stage in run.stages():
            family = stage.partition("@")[0]
            if done[family] < shares.get(family, 0):
                kill = attempt(run, stage, lasts.get(family, USUAL), chance)
                if kill is not None:
                    done[family] += 1
                    kills.append(kill)
                    print(f"{len(kills):4} {kill}", flush=True)
                    break
        code = run.end()
        completed += run.completed()
        if before and before.stage in run.skipped():  # it was through when it was killed
            completed[before.stage] += 1
        assert code == 0 or kill is not None, f"failed by itself:\n{''.join(run.output[-25:])}"
        if code == 0:
            if not (quick := [family for family, share in shares.items() if done[family] < share]):
                return kills, completed
            for family in quick:  # it was through before it could be killed: once more
                forget(study, family)


def attempt(run: Run, stage: str, lasts: float, chance: random.Random) -> Kill | None:
    """Ends the run while this stage is at work; None if it was through before."""
    when = chance.choices(("moment", "write", "lock"), (5, 3, 2))[0]
    number = chance.choice(SIGNALS)
    # DVC leaves SIGINT to the stage, as a terminal sends it to the whole group.
    target = chance.choice(TARGETS[1:] if number == signal.SIGINT else TARGETS)
    began = run.since
    match when:
        case "moment":
            until = began + chance.uniform(0, lasts)
            wait_until(lambda: time.monotonic() > until, run, stage)
        case "write":
            before = run.study.temporaries()
            wait_until(lambda: bool(run.study.temporaries() - before), run, stage)
        case "lock":
            target, number = ("dvc", signal.SIGKILL) if target == "stage" else (target, number)
            wait_until(run.locking.is_set, run, stage)
            time.sleep(chance.uniform(0, 0.5))
    if run.stage != stage or not run.strike(target, number):
        return None
    kill = Kill(stage, when, target, number.name, round(time.monotonic() - began, 3))
    until = time.monotonic() + PATIENCE
    while run.process.poll() is None and run.stage == stage:
        assert time.monotonic() < until, f"outlives {kill}:\n{''.join(run.output[-25:])}"
        time.sleep(0.01)
    if run.stage != stage or run.process.wait(PATIENCE) == 0:
        print(f"     too late: {kill}", flush=True)  # the stage was through
        return None
    return kill


def wait_until(condition: Callable[[], bool], run: Run, stage: str) -> None:
    """Looks every millisecond, until the condition holds or the stage is over."""
    while run.stage == stage and run.process.poll() is None and not condition():
        time.sleep(0.001)


def forget(study: Study, family: str) -> None:
    """Makes DVC run a family's first stage again, whose result is the same."""
    (study.folder / ".ckpt" / "smoke" / "dvc.lock").unlink(missing_ok=True)  # it would put the entry back
    text = (study.folder / GRAPH).with_name("dvc.lock").read_text()
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if re.fullmatch(rf"  {family}(@.*)?:\n", line))
    last = next((i for i in range(first + 1, len(lines)) if re.match(r"  \S|\S", lines[i])), len(lines))
    (study.folder / GRAPH).with_name("dvc.lock").write_text("".join(lines[:first] + lines[last:]))


def contents(study: Study) -> dict[str, bytes]:
    """All results; run.json and the report hold times and revisions."""
    found = {}
    for root in ("runs/smoke", "metrics/smoke", "reports/smoke/tables"):
        for path in sorted((study.folder / root).rglob("*")):
            if path.is_file() and path.name != "run.json":
                found[str(path.relative_to(study.folder))] = path.read_bytes()
    return found


def differing(first: Study, second: Study) -> list[str]:
    """Results that are not equal to the bit, or not in both."""
    a, b = contents(first), contents(second)
    # The report's tables of times and costs are those of the runs' own records.
    timed = ("time.csv", "time.md", "cost.csv", "cost.md")
    return sorted(
        name for name in a.keys() | b.keys() if a.get(name) != b.get(name) and not name.endswith(timed)
    )


def left_behind(study: Study, completed: Counter[str]) -> list[str]:
    """Temporary files, checkpoints, and MLflow's runs that are RUNNING or more than were completed."""
    study.check()  # as the next start does
    found = [f"temporary file {path}" for path in study.temporaries()]
    found += [f"checkpoint {path}" for path in (study.folder / ".ckpt").glob("*/*/")]
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-m", "attention_transfer", "sync"],
            cwd=study.folder,
            env=study.environment(""),
            stdout=subprocess.DEVNULL,
            check=True,
        )
    told = subprocess.run(
        [sys.executable, "-c", RUNS],
        cwd=study.folder,
        env=study.environment(""),
        check=True,
        capture_output=True,
        text=True,
    )
    runs = json.loads(told.stdout.splitlines()[-1])
    found += [f"run {stage} is RUNNING" for stage, status in runs if status == "RUNNING"]
    shown = Counter(stage for stage, status in runs if status == "FINISHED" and stage)
    # A stage that was through when it was killed may never be seen again: it counts once.
    many = {stage: count for stage, count in shown.items() if count > max(completed[stage], 1)}
    return found + [f"{count} runs of {stage}" for stage, count in many.items()]


RUNS = """
import json
from pathlib import Path
from attention_transfer.tracking.database import connect
runs = connect(Path()).search("tags.kind = 'stage'")
runs = [run for run in runs if run.data.tags["study"] == "smoke"]
stages = [run.data.tags.get("dvc.stage", "").rpartition(":")[2] for run in runs]
print(json.dumps([[stage, run.info.status] for stage, run in zip(stages, runs)]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(FAMILIES), help="families to kill (default: all)")
    parser.add_argument("--small", action="store_true", help="a part of the study: two runs of one seed")
    parser.add_argument("--jobs", type=int, default=0, help="stages at a time, as make study has it")
    options = parser.parse_args()
    # What a shell starts in the background ignores SIGINT, and hands that on to its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = options.stages.split(",")
    folder = options.folder.resolve()
    whole, killed = (Study(folder / name, small=options.small) for name in ("undisturbed", "killed"))
    began = time.monotonic()
    lasts = undisturbed(whole, options.jobs)
    whole_seconds = time.monotonic() - began
    each, rest = divmod(options.kills, len(chosen))
    shares = {family: each + (index < rest) for index, family in enumerate(chosen)}
    if options.jobs:
        kills = harried(killed, options.kills, options.jobs, whole_seconds, options.seed)
        completed = Counter[str]()  # no stage is made twice
    else:
        kills, completed = disturbed(killed, shares, lasts, options.seed)
    differ, left = differing(whole, killed), left_behind(killed, completed)
    result = {
        "kills": [asdict(kill) for kill in kills],
        "files": len(contents(whole)),
        "differing": differ,
        "left_behind": left,
        "bit_identical": not differ,
        "jobs": options.jobs,
    }
    (folder / "kills.json").write_text(json.dumps(result, indent=1))
    print(
        f"{len(kills)} kills, {result['files']} files, {len(differ)} differ, left behind: {left or 'nothing'}"
    )
    sys.exit(bool(differ or left))


if __name__ == "__main__":
    main()
