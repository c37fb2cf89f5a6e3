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
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from copies import GRAPH, Study, contents, differing, left_behind
from running import PATIENCE, Run

FAMILIES = (
    *("data", "split", "pretrain", "probe", "finetuned", "cache", "resolve"),
    *("train", "shifts", "predict", "maps", "similarity", "evaluate", "report"),
)
USUAL = 5.0  # seconds of a stage that the undisturbed run found done
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


def harried(study: Study, count: int, jobs: int, seconds: float, seed: int) -> list[Kill]:
    """Strikes the study at random moments, so many times, and lets it end; all parts of it have their turn.

    Args:
        seconds: that it takes if nobody disturbs it.
    """
    chance, kills = random.Random(seed), list[Kill]()
    while True:
        run = Run(study, jobs)
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
    run, began = Run(study, jobs), {}
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
        run = Run(study)
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
