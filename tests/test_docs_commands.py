"""Every command that a page shows is run, in a copy of the repository where a small study has run; or it is named here.

In order of the pages, each on what the one before it has left.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import prepared_study
import pytest
from test_commands_new import draw

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "docs" / f"{name}.md" for name in ("tutorial", "storage")),
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem not in ("tutorial", "storage")),
]
COMMAND = re.compile(
    r"(make|dvc|python|pip|git|conda|mlflow|attention-transfer|source|ssh|export|apt-get|ls) [\w.\"-]"
)
OF_STUDY = "doctor|status|check|show|plan|detectable|verify|prune|run|report|export"
# Not run, and why. A pattern that fits none of the commands is an error too.
LEFT_OUT = {
    r"make (study( STUDY=(full.*|flowers|blooms|\.\.))?|tune)": "takes from half an hour to days",
    r"python -m attention_transfer ((plan|report|export) .*flowers\.yaml|new flowers .*--heads 12)": (
        "tests/test_bring_your_own.py"
    ),
    r"make (test|check)": "is what runs this test",
    r"python -m attention_transfer run( --jobs \d+)?( --params presets/smoke\.yaml)?( --jobs \d+)?": (
        "is what make study STUDY=smoke runs"
    ),
    r"make bench": "tests/test_benchmarks.py runs it on small shapes",
    r"make ui( PORT=5001)?": "serves until it is stopped: tests/test_study.py, tests/test_tracking_in_browser.py",
    r"make lock|pip install .*|conda env .*|source .*": "installs packages, or asks which there are",
    r"python faults/\w+\.py FOLDER": "takes an hour: tests/test_faults.py tries each kind once",
    r"dvc exp run .*": "tests/test_study.py runs one",
    r"dvc commit": "DVC asks before it believes; tests/prepared_study.py says --force",
    r"dvc pull .*|dvc push( studies/smoke/dvc\.yaml)?|git (add|commit) .*|dvc status .*|dvc gc --workspace"
    r"|dvc remote add --default store /mnt.*": "test_results_reach_another_machine",
    r"dvc remote .*(s3:|endpointurl).*|dvc remote modify --local": "needs an object store",
    r"mlflow server .*|export MLFLOW_TRACKING_URI=.*|ssh .*": "tests/test_docs_server.py",
    r"make study STUDY=imagenet1k|dvc repro -f studies/imagenet1k/dvc\.yaml:shifts"
    r"|python -m attention_transfer check --params presets/imagenet1k\.yaml": "needs ImageNet",
    r"python -m attention_transfer plan (--params presets/imagenet1k\.yaml )?--gpus.*": "test_commands_plan_gpus.py",
    r"python -m attention_transfer(\.reporting\.rules)?": "is a name; tests/test_reporting_rules.py",
}
# Where a page leaves something open, or means the default study: what is run instead.
INSTEAD = {
    r"^(python -m attention_transfer (?:"
    + OF_STUDY
    + r")\b(?!.*--params).*)$": r"\1 --params presets/smoke.yaml",
    r"presets/full\.yaml": "presets/smoke.yaml",
    r"compare A B": "compare core smoke",
    r"remake STAGE": "remake studies/smoke/dvc.yaml:split",
    r"new NAME --images FOLDER": "new other --images data/flowers",
    r"new \w+ (.*timm:)": r"new another \1",
    r"export RUN": "export distill",
    r"(detectable .*)flowers(.*)flowers": r"\1smoke\2smoke",
    r"detectable --params (?!.*--pilot)": "detectable --pilot presets/smoke.yaml --params ",
    r"^dvc repro$": "dvc repro studies/smoke/dvc.yaml",
    r"^make ": "make -o setup ",  # the environment that runs the tests
}


@dataclass
class Copy:
    """A repository with a study that has run."""

    folder: Path

    def run(self, command: str) -> str:
        """Runs a line in a shell, as it stands on a page: what it says."""
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_TR"))
        }
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=environment
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(self.folder / "src"),
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "ATTENTION_TRANSFER_DEVICE": "cpu",
                "ATTENTION_TRANSFER_THREADS": "1",
                "COLUMNS": "200",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
        assert "Traceback" not in done.stdout, done.stdout[-3000:]
        return done.stdout


def commands(page: Path) -> list[str]:
    """What a page shows as commands: lines of blocks without a language, and in the text between single quotes."""
    lines, text, language = [], [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):  # within a list, too
            language = line.lstrip().removeprefix("```") if language is None else None
            text.append("")
        elif language is None:
            text.append(line)
        elif language == "":
            lines.append(re.sub(r"\s+#.*", "", line.strip()))
    inline = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", "\n".join(text))]
    found = [line for line in (*lines, *inline) if COMMAND.match(line)]
    return list(dict.fromkeys(found))


def left_out(command: str) -> bool:
    return any(re.fullmatch(pattern, command) for pattern in LEFT_OUT)


def as_run(command: str) -> str:
    for pattern, instead in INSTEAD.items():
        command = re.sub(pattern, instead, command)
    return command


SHOWN = [(page, command) for page in PAGES for command in commands(page)]
RUN = list(dict.fromkeys(as_run(command) for _, command in SHOWN if not left_out(command)))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    folder = tmp_path_factory.mktemp("docs")
    prepared_study.copy(folder)
    for split, count in (("train", 24), ("test", 6)):
        draw(folder / "data" / "flowers", split, count)
    made = Copy(folder)
    made.run("python tests/prepared_study.py")
    return made


def test_what_is_left_out_is_shown_somewhere() -> None:
    for pattern in LEFT_OUT:
        assert any(re.fullmatch(pattern, command) for _, command in SHOWN), pattern
    assert len(RUN) > 25


@pytest.mark.slow
def test_the_prepared_study_is_one_that_dvc_takes_for_run(copy: Copy) -> None:
    assert copy.run(f"dvc status {prepared_study.GRAPH}").strip() == "Data and pipelines are up to date."


@pytest.mark.slow
def test_dvc_shows_the_study_and_its_commits(copy: Copy) -> None:
    """A committed revision too, whose files DVC reads as git keeps them."""
    revisions = json.loads(copy.run("dvc exp show --json"))
    assert [revision.get("error") for revision in revisions] == [None, None]
    plots = json.loads(copy.run("dvc plots show --json"))
    assert not plots.get("errors")
    assert {"accuracy, core", "accuracy, smoke", "reports/smoke/figures/main.png"} <= plots["data"].keys()
    rows = copy.run("dvc metrics show").splitlines()
    assert [row.split()[0] for row in rows if row.startswith("metrics/")] == [
        "metrics/core/evaluate/metrics.json",
        "metrics/smoke/evaluate/metrics.json",
    ]
    assert "test_accuracy.distill" in rows[0]


@pytest.mark.slow
def test_the_teacher_of_the_tutorial_is_saved(copy: Copy) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    [block] = re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    (copy.folder / "teacher.py").write_text(block, encoding="utf-8")
    copy.run("python teacher.py")
    assert (copy.folder / "data" / "teacher.safetensors").exists()


@pytest.mark.slow
def test_the_first_change_of_the_tutorial_would_rerun_that_run(copy: Copy) -> None:
    """By DVC's account; tests/test_study.py runs such changes."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    [block] = re.findall(r"(?ms)^```yaml\n(.*?)^```$", text)
    preset = copy.folder / prepared_study.PRESET
    before = preset.read_text(encoding="utf-8")
    [line] = [line.partition(" #")[0] for line in block.splitlines() if "#" in line]
    changed = re.sub(r"(method: copy\n(?:    .*\n)*?)    layers: all\n", rf"\1{line}\n", before)
    assert changed != before
    preset.write_text(changed, encoding="utf-8")
    told = json.loads(copy.run("python -m attention_transfer status --json --params presets/smoke.yaml"))
    preset.write_text(before, encoding="utf-8")
    changed_params, waiting = (
        {each["stage"].rpartition(":")[2] for each in told if bool(each["reasons"]) is by_itself}
        for by_itself in (True, False)
    )
    assert changed_params == {"resolve@copy", "evaluate", "similarity", "maps", "report"}
    assert waiting == {f"{stage}@copy-{seed}" for stage in ("train", "predict") for seed in (0, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_command_that_a_page_shows_runs(command: str, copy: Copy) -> None:
    copy.run(command)


@pytest.mark.slow
def test_results_reach_another_machine(copy: Copy, tmp_path: Path) -> None:
    """docs/storage.md, step by step, with a folder that both see."""
    steps = commands(ROOT / "docs" / "storage.md")
    added = next(step for step in steps if step.startswith("dvc remote add") and "/mnt/share" in step)
    copy.run(added.replace("/mnt/share", str(tmp_path)))
    for begin in ("git commit", "dvc push", "git add"):
        copy.run(next(step for step in steps if step.startswith(begin)))
    copy.run("git add presets")  # which are this copy's own
    copy.run(next(step for step in steps if "Smoke study" in step))
    copy.run(f"git clone --quiet . {tmp_path / 'clone'}")
    other = Copy(tmp_path / "clone")
    for begin in ("dvc pull studies/smoke/dvc.yaml", "dvc status"):
        told = other.run(next(step for step in steps if step.startswith(begin)))
    assert told.strip() == "Data and pipelines are up to date."
    weights = "runs/smoke/students/distill/0/model.safetensors"
    assert (other.folder / weights).read_bytes() == (copy.folder / weights).read_bytes()
    other.run("rm -r runs/smoke/students && dvc pull --quiet studies/smoke/dvc.yaml:train@distill-0")
    assert [path.name for path in (other.folder / "runs/smoke/students").iterdir()] == ["distill"]
    other.run("dvc gc --workspace --force")
    assert (other.folder / weights).exists()
