"""The whole study through DVC itself, on the smoke preset, in a copy of the working tree. Its stages start at once.

Those that an ordinary `python` starts are run by tests/test_faults.py, and by the test below that kills a training.

The tests run in the order of this file, each on what the one before it has left.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import safetensors.numpy
import yaml
from scipy.special import logsumexp

pytestmark = pytest.mark.slow  # in order, by one worker: make test deals out whole files

ROOT = Path(__file__).parent.parent
GRAPH = "studies/smoke/dvc.yaml"
PRESET = "presets/smoke.yaml"
LARGEST = ("studies/full/", "presets/full", "studies/tune/", "presets/tune", "studies/imagenet1k/")
METHODS = ("scratch", "finetune", "copy", "distill")
COLLECTORS = {"evaluate", "similarity", "maps", "report"}
FAMILIES = {
    "data",
    "split",
    "pretrain",
    "probe",
    "cache",
    "finetuned",
    "resolve",
    "train",
    "shifts",
    "predict",
} | COLLECTORS
SECONDS = 1800  # for one command; a repro of the smoke study takes three minutes on two idle cores
SERVER_SECONDS = 180
MAIN_COLUMNS = ["run", "seeds"] + [
    f"{value}_{part}" for value in ("accuracy", "gap_recovered") for part in ("mean", "low", "high")
]
CLAIM_KEYS = {
    "id",
    "experiment",
    "claim",
    "published",
    "effect",
    "interval",
    "n_seeds",
    "rule",
    "verdict",
}


@dataclass
class Answer:
    """What a command said, and which stages it ran."""

    code: int
    text: str

    @property
    def ran(self) -> list[str]:
        """Names of the stages that DVC started, in order, without the path of their dvc.yaml."""
        return [name.rpartition(":")[2] for name in re.findall(r"Running stage '([^']+)'", self.text)]


@dataclass
class Study:
    """A copy of the working tree, in which DVC runs."""

    folder: Path
    ready: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outer = ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "ATTENTION_TRANSFER_DEVICE")
        self.environment = {key: value for key, value in os.environ.items() if key not in outer} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "src"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "ATTENTION_TRANSFER_DEVICE": "cpu",
            "ATTENTION_TRANSFER_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "SHELL": "/bin/sh",  # of the shells that DVC may use, the one that stays between it and the stage
            "COLUMNS": "400",  # DVC cuts its tables at the width of the terminal
        }

    def run(self, *command: str, **environment: str) -> Answer:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return Answer(done.returncode, done.stdout)

    def repro(self, *arguments: str, **environment: str) -> Answer:
        return self.run("dvc", "repro", *arguments, **environment)

    def stages_run(self, *arguments: str) -> set[str]:
        """Stages that a `dvc repro` which must succeed has run."""
        answer = self.repro(*arguments)
        assert answer.code == 0, answer.text[-3000:]
        assert len(answer.ran) == len(set(answer.ran))
        return set(answer.ran)

    @contextlib.contextmanager
    def edited(self) -> Iterator[dict[str, Any]]:
        """The preset's values; what is changed in them is written back."""
        path = self.folder / PRESET
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        yield values
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    @contextlib.contextmanager
    def kept_file(self, name: str) -> Iterator[Path]:
        """A file that may be changed, and is put back afterwards."""
        path = self.folder / name
        before = path.read_bytes()
        try:
            yield path
        finally:
            replace(path, before)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def runs(self, filter_string: str) -> list[dict[str, Any]]:
        """MLflow's runs, newest first, as its own client reads them from the database: status and tags."""
        script = (
            "import json, sys, mlflow\n"
            "from mlflow.tracking import MlflowClient\n"
            "client = MlflowClient('sqlite:///mlflow.db')\n"
            "ids = [e.experiment_id for e in client.search_experiments()]\n"
            "found = client.search_runs(ids, sys.argv[1], order_by=['attributes.start_time DESC'])\n"
            "print('@' + json.dumps([{'id': r.info.run_id, 'status': r.info.status, 'tags': r.data.tags}"
            " for r in found]))\n"
        )
        answer = self.run(sys.executable, "-W", "ignore", "-c", script, filter_string)
        assert answer.code == 0, answer.text
        found: list[dict[str, Any]] = json.loads(answer.text.rpartition("\n@")[2].removeprefix("@"))
        return found


def replace(path: Path, content: bytes) -> None:
    """Writes a new file in the place of one that DVC may have linked to its cache."""
    path.unlink()
    path.write_bytes(content)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    return pytest.fail(f"{what} did not come within {seconds:.0f} s")


@pytest.fixture(scope="module")
def working_copy(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The files that git would commit now, in a repository of their own; no records of earlier runs.

    Nor the study with most of the stages, which each DVC command would read: that takes it most of its time.
    """
    folder = tmp_path_factory.mktemp("study")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        source, target = ROOT / name, folder / name
        left_out = name.startswith(("metrics/", "reports/", *LARGEST)) or name.endswith("dvc.lock")
        if name and not left_out and (source.exists() or source.is_symlink()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    # Downloaded images, where they do not come from Debian's package.
    shutil.copytree(ROOT / "data", folder / "data", dirs_exist_ok=True)
    study = Study(folder)
    commit(study)
    return study


def commit(study: Study) -> None:
    identity = (("config", "user.name", "test"), ("config", "user.email", "test@example.org"))
    for command in (("init", "-q"), *identity, ("add", "-A"), ("commit", "-q", "-m", "test")):
        answer = study.run("git", *command)
        assert answer.code == 0, answer.text


@pytest.fixture
def study(working_copy: Study) -> Study:
    """The study after its first run: without it the other tests have nothing to look at."""
    if not working_copy.ready:
        pytest.fail("the first dvc repro has not succeeded")
    return working_copy


@pytest.fixture(scope="module")
def search(working_copy: Study) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Asks the real MLflow server, as `python -m attention_transfer ui` starts it, for runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = working_copy.folder / "ui.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "attention_transfer", "ui", "--port", str(port)],
            cwd=working_copy.folder,
            env=working_copy.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    browser = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with browser.open(request, timeout=30) as response:
            return response.read()

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return bool(ask("/health") == b"OK")
        except (urllib.error.URLError, OSError):
            return False

    def runs(filter_string: str) -> list[dict[str, Any]]:
        api = "/api/2.0/mlflow"
        experiments = json.loads(ask(f"{api}/experiments/search?max_results=100"))["experiments"]
        ids = [experiment["experiment_id"] for experiment in experiments]
        body = {"experiment_ids": ids, "filter": filter_string, "max_results": 1000}
        found = json.loads(ask(f"{api}/runs/search", body)).get("runs", [])
        return [
            {
                "status": run["info"]["status"],
                "tags": {tag["key"]: tag["value"] for tag in run["data"]["tags"]},
            }
            for run in found
        ]

    try:
        wait_for(healthy, "the MLflow server", SERVER_SECONDS)
        yield runs
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_first_run_makes_the_report(working_copy: Study, warm_path: str) -> None:
    working_copy.environment["PATH"] = warm_path
    ran = working_copy.stages_run(GRAPH)
    working_copy.ready = True
    grid = [f"{run}-{seed}" for run in METHODS for seed in (0, 1)]
    assert ran == {
        *("data", "split", "pretrain@mae", "probe@mae", "cache@mae", "finetuned", "shifts", *COLLECTORS),
        *(f"resolve@{run}" for run in METHODS),
        *(f"{stage}@{instance}" for stage in ("train", "predict") for instance in grid),
    }

    report = working_copy.folder / "reports" / "smoke"
    assert "<html" in (report / "report.html").read_text(encoding="utf-8")
    assert (report / "report.md").read_text(encoding="utf-8").startswith("# ")
    with (report / "tables" / "main.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert header == MAIN_COLUMNS
    assert tuple(row[0] for row in rows) == METHODS
    assert all(row[1] == "2" and 0 < float(row[2]) < 1 for row in rows)
    claims = working_copy.json("reports/smoke/claims.json")
    assert claims
    assert all(claim.keys() >= CLAIM_KEYS for claim in claims)
    assert {claim["verdict"] for claim in claims} <= {"supported", "contradicted", "not resolved"}
    # Of two seeds there is one pair of a run with itself: a self-ensemble has one value.
    assert {claim["n_seeds"] for claim in claims} == {1, 2}


def test_temperatures_are_the_best_on_the_validation_images(study: Study) -> None:
    found = pd.read_csv(study.folder / "metrics/smoke/evaluate/calibration.csv")
    assert len(found) == 2 * len(METHODS)
    fitted = found.dropna()
    assert len(fitted)
    for row in fitted.itertuples(index=False):
        folder = study.folder / f"runs/smoke/predictions/{row.run}/{row.seed}"
        losses = {}
        for which in ("validation", "test"):
            stored = safetensors.numpy.load_file(folder / f"{which}.safetensors")
            logits, labels = stored["logits"].astype(np.float64), stored["labels"]
            for share in (0.98, 1.0, 1.02):
                scaled = logits / (share * row.temperature)
                rows = np.arange(len(labels))
                losses[which, share] = (logsumexp(scaled, axis=1) - scaled[rows, labels]).mean()
        assert losses["validation", 1.0] <= min(losses["validation", share] for share in (0.98, 1.02)) + 1e-9
        assert row.nll_scaled == pytest.approx(losses["test", 1.0], abs=2e-5)


def test_second_run_runs_nothing(study: Study) -> None:
    assert study.stages_run(GRAPH) == set()


def test_studies_do_not_disturb_each_other(study: Study) -> None:
    assert study.stages_run("split") == {"data", "split"}
    assert study.stages_run(GRAPH) == set()
    assert study.stages_run("split") == set()


def test_edits_rerun_what_they_affect(study: Study) -> None:
    """Another learning rate, another seed in the place of one, new runs, a fine-tuned teacher: all in one edit."""
    old = {run: digests(study.folder / f"runs/smoke/students/{run}/0") for run in METHODS}
    with study.edited() as values:
        runs = values["runs"]
        runs["copy"]["learning_rate"] = 0.002
        values["seeds"] = [0, 2]
        values["finetuned_teachers"] = {"tutor": {"seed": 7, "run": {**runs["finetune"]}}}
        recipe = {key: value for key, value in runs["scratch"].items() if key != "method"}
        loss = {"weight": 1.0, "teacher": "tutor"}
        runs["by_logits"] = {**recipe, "method": "distill_logits", "logit_loss": loss}
        loss = {"weight": 1.0}
        runs["by_features"] = {**recipe, "method": "distill_features", "layers": "all", "feature_loss": loss}
    added = ("by_logits", "by_features")
    new = [f"{run}-2" for run in METHODS] + [f"{run}-{seed}" for run in added for seed in (0, 2)] + ["copy-0"]
    assert study.stages_run(GRAPH) == {
        "finetuned",
        *(f"resolve@{run}" for run in (*METHODS, *added)),  # seconds; what is not changed stays
        *(f"{stage}@{instance}" for stage in ("train", "predict") for instance in new),
        *COLLECTORS,
    }
    now = {run: digests(study.folder / f"runs/smoke/students/{run}/0") for run in METHODS}
    assert [run for run in METHODS if now[run] != old[run]] == ["copy"]
    assert now["copy"]["model.safetensors"] != old["copy"]["model.safetensors"]
    assert set(added) <= set(pd.read_csv(study.folder / "reports/smoke/tables/main.csv")["run"])
    for run, column in zip(added, ("logit_loss", "feature_loss"), strict=True):
        curve = pd.read_csv(study.folder / f"metrics/smoke/train/{run}/0/curve.csv")
        assert (curve[column] > 0).all()
        assert curve["attention_loss"].isna().all()
    assert 0 < study.json("metrics/smoke/finetuned/metrics.json")["tutor_validation_accuracy"] < 1


def test_removed_runs_and_seeds_leave_no_number_behind(study: Study) -> None:
    with study.edited() as values:
        for run in ("by_logits", "by_features"):
            del values["runs"][run]
        values["finetuned_teachers"], values["seeds"] = {}, [0, 1]
    # What seed 1 had left counts again, but for the run with another learning rate.
    again = {"train@copy-1", "predict@copy-1"}
    resolved = {f"resolve@{run}" for run in METHODS}
    assert study.stages_run(GRAPH) == {"finetuned", *resolved, *again, *COLLECTORS}
    assert not (study.folder / "runs/smoke/finetuned/tutor").exists()
    # Its outputs are still there (prune deletes them): nothing may pick them up.
    assert (study.folder / "runs/smoke/predictions/by_logits/0/test.safetensors").exists()
    assert (study.folder / "metrics/smoke/train/by_logits/0/metrics.json").exists()
    files = [
        *(study.folder / "reports/smoke/tables").iterdir(),
        *(study.folder / "metrics/smoke/evaluate").glob("*.csv"),
        *(study.folder / "reports/smoke").glob("report.*"),
    ]
    assert len(files) > 10
    assert [file.name for file in files if "by_logits" in file.read_text(encoding="utf-8")] == []
    for name in ("scores", "ood"):
        rows = csv.DictReader((study.folder / f"metrics/smoke/evaluate/{name}.csv").read_text().splitlines())
        assert {row["seed"] for row in rows} == {"0", "1"}


def test_an_experiment_runs_on_the_studys_data_and_teachers(study: Study) -> None:
    """Its runs alone; the study itself and its other stages stay as they are."""
    preset, experiment = add_experiment(study, "heads", {"copy_a_head": {"heads": [0]}})
    graph = "studies/smoke/heads/dvc.yaml"
    runs = {"resolve@copy_a_head", "train@copy_a_head-0", "predict@copy_a_head-0"}
    expected = {*runs, "evaluate", "similarity"}
    assert study.stages_run(graph) == expected
    assert study.stages_run(graph) == set()
    scores = pd.read_csv(study.folder / "metrics/smoke/evaluate/heads/scores.csv")
    assert set(scores["run"]) == {"copy_a_head"}
    assert set(scores["set"]) == {"validation", "test"}
    # What gathers all records has one folder more to look at; nothing else of the study is touched.
    assert study.stages_run(GRAPH) == {"report"}
    (trained,) = study.runs("tags.run = 'copy_a_head' and tags.stage = 'train'")
    assert trained["tags"]["study"] == "smoke"
    assert study.run(sys.executable, "-m", "attention_transfer", "sync").code == 0
    (trained,) = study.runs("tags.run = 'copy_a_head' and tags.stage = 'train'")
    assert trained["tags"]["dvc.stage"] == "train@copy_a_head-0"
    preset.write_text(yaml.safe_dump(experiment | {"seeds": [1]}), encoding="utf-8")
    assert study.stages_run(graph) == {
        "train@copy_a_head-1",
        "predict@copy_a_head-1",
        "evaluate",
        "similarity",
    }
    remove_experiments(study)


def test_an_experiment_with_data_of_its_own_takes_the_studys_teachers(study: Study) -> None:
    """Another task, whose labels and images are not the study's."""
    before = digests(study.folder / "runs/smoke/data")
    own = {"source": "digits", "labelled": 50, "validation": 250}
    add_experiment(study, "digits", {"copy_digits": {}}, data=own)
    graph = "studies/smoke/digits/dvc.yaml"
    made = {"data", "split", "cache@mae"}
    runs = {"resolve@copy_digits", "train@copy_digits-0", "predict@copy_digits-0", "evaluate", "similarity"}
    assert study.stages_run(graph) == made | runs
    scores = pd.read_csv(study.folder / "metrics/smoke/evaluate/digits/scores.csv")
    assert set(scores["examples"]) == {250, 360}
    predicted = safetensors.numpy.load_file(
        study.folder / "runs/smoke/experiments/digits/predictions/copy_digits/0/test.safetensors"
    )
    assert predicted["logits"].shape == (360, 10)
    assert digests(study.folder / "runs/smoke/data") == before
    remove_experiments(study)


def add_experiment(
    study: Study, name: str, runs: dict[str, dict[str, Any]], data: dict[str, Any] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Writes an experiment of short runs, copies but for what is given: its params, and its graph."""
    values = yaml.safe_load((study.folder / PRESET).read_text(encoding="utf-8"))
    preset = study.folder / f"presets/smoke/{name}.yaml"
    preset.parent.mkdir(exist_ok=True)
    short = {**values["runs"]["copy"], "epochs": 2, "warmup_epochs": 1.0}
    experiment = {
        "extends": "../smoke.yaml",
        "name": f"smoke/{name}",
        "seeds": [0],
        "runs": {run: short | own for run, own in runs.items()},
        "ensembles": {},
        "evaluation": {"sets": ["validation", "test"]},
        **({"data": data} if data else {}),
    }
    preset.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    with study.edited() as values:
        values["experiments"] = [name]
    assert study.run(sys.executable, "studies/graphs.py").code == 0
    return preset, experiment


def remove_experiments(study: Study) -> None:
    """Takes away their files, and the records that the report would look at."""
    shutil.rmtree(study.folder / "presets/smoke")
    with study.edited() as values:
        values["experiments"] = []
    for folder in [path for path in (study.folder / "studies/smoke").iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
        for stage in ("evaluate", "similarity"):
            shutil.rmtree(study.folder / f"metrics/smoke/{stage}" / folder.name)


def test_added_shift_computes_its_predictions_alone(study: Study) -> None:
    grid = [(run, seed) for run in METHODS for seed in (0, 1)]
    folders = {(run, seed): study.folder / f"runs/smoke/predictions/{run}/{seed}" for run, seed in grid}
    before = {key: digests(folder) for key, folder in folders.items()}
    images = digests(study.folder / "runs/smoke/shifts")
    with study.edited() as values:
        values["evaluation"]["shifts"].append("brightness")
        severities = values["evaluation"]["severities"]
    predicted = {f"predict@{run}-{seed}" for run, seed in grid}
    assert study.stages_run(GRAPH) == {"shifts", *predicted, "evaluate", "report"}
    added = {f"brightness-{severity}.safetensors" for severity in severities}
    for key, folder in folders.items():
        after = digests(folder)
        assert after.keys() - before[key].keys() == added
        assert {name: after[name] for name in before[key]} == before[key]
        record = f"metrics/smoke/predict/{key[0]}/{key[1]}"
        assert study.json(f"{record}/metrics.json")["sets"] == len(after)
        kept = study.json(f"{record}/run.json")["paths"]["predictions"]
        assert kept == f"{len(severities)} of {len(after)} sets computed, the others kept"
    now = digests(study.folder / "runs/smoke/shifts")
    kept = {name for name in images if name.endswith("-1.npz") or name.endswith("-5.npz") or "digits" in name}
    assert len(kept) == 5
    assert {name: now[name] for name in kept} == {name: images[name] for name in kept}


def test_edited_figure_reruns_the_report_alone(study: Study) -> None:
    with study.kept_file("src/attention_transfer/reporting/figures.py") as path:
        replace(path, path.read_bytes() + b"# edited\n")
        told = study.run("dvc", "status", "--json", GRAPH)
    assert told.code == 0, told.text[-3000:]
    assert list(json.loads(told.text)) == [f"{GRAPH}:report"]


def test_the_report_is_made_and_shown_by_itself(study: Study) -> None:
    page = study.folder / "reports" / "smoke" / "report.html"
    page.unlink()
    shown = study.run(sys.executable, "-m", "attention_transfer", "report", "--params", PRESET)
    assert shown.code == 0, shown.text[-3000:]
    assert str(page) in shown.text
    assert "distill" in shown.text
    assert page.exists()


@dataclass
class Running:
    """A `dvc repro` in a process group of its own, stopped while it trains."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def training(self, label: str) -> psutil.Process | None:
        """The training process, once its progress shows more than its first steps."""
        if self.process.poll() is not None:
            pytest.fail(f"dvc ended before it could be stopped:\n{self.text[-3000:]}")
        if not any(step > 0 for step in steps_shown(self.text, label)):
            return None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("python") and "pipeline/train.py" in child.cmdline():
                    return child
        return None


def start_repro(study: Study, stage: str, log: Path) -> Running:
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["dvc", "repro", f"{GRAPH}:{stage}"],
            cwd=study.folder,
            env=study.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    return Running(process, log)


def steps_shown(text: str, label: str) -> list[int]:
    """The numbers of steps in the progress bars of one stage, in order."""
    return [int(step) for step in re.findall(rf"{label}: +\d+%[^\r\n]*?\| (\d+)/\d+ \[", text)]


def processes_in(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
    return found


def saved_steps(study: Study, label: str) -> int | None:
    """The step in a stage's checkpoint; None if there is none."""
    import torch

    path = next((study.folder / ".ckpt/smoke").glob(f"{label}-*/state.pt"), None)
    if path is None:
        return None
    with path.open("rb") as file:
        file.seek(8)  # the checksum
        state = torch.load(file, weights_only=True)
    return int(state["steps"])


@pytest.fixture
def ordinary_training(study: Study, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Trainings start by the ordinary `python`, for how stages die with DVC."""
    monkeypatch.setitem(study.environment, "COLD_STAGES", "train")
    return study


def test_killed_training_goes_on_and_ends_the_same(ordinary_training: Study, tmp_path: Path) -> None:
    study, stage, label = ordinary_training, "train@distill-0", "train-distill-0"
    preset, short = (
        (study.folder / PRESET).read_bytes(),
        digests(study.folder / "runs/smoke/students/distill/0"),
    )
    with study.edited() as values:
        epochs = values["runs"]["distill"]["epochs"] = 400  # tens of seconds, on a fast machine too
        steps = epochs * (values["data"]["labelled"] // values["runs"]["distill"]["batch_size"])

    # Killed outright: dvc, its shell and the stage at once.
    running = start_repro(study, stage, tmp_path / "killed.log")
    wait_for(lambda: running.training(label), "the training")
    os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()
    wait_for(lambda: not processes_in(study.folder), "the end of all processes", 60)
    assert not (study.folder / "runs/smoke/students/distill/0/model.safetensors").exists()
    assert not (study.folder / "metrics/smoke/train/distill/0/run.json").exists()

    # dvc alone is killed: the stage must not go on writing without it, and saves its state.
    running = start_repro(study, stage, tmp_path / "orphaned.log")
    wait_for(lambda: running.training(label), "the training")
    running.process.kill()
    running.process.wait()
    wait_for(lambda: not processes_in(study.folder), "the end of all processes", 60)
    first = saved_steps(study, label)
    assert first is not None
    assert 0 < first < steps

    # The stage alone is asked to stop, as a scheduler asks.
    running = start_repro(study, stage, tmp_path / "stopped.log")
    wait_for(lambda: running.training(label), "the training").terminate()
    assert running.process.wait(120) != 0
    assert "failed to reproduce" in running.text
    assert min(steps_shown(running.text, label)) >= first
    second = saved_steps(study, label)
    assert second is not None
    assert first < second < steps
    assert processes_in(study.folder) == []

    answer = study.repro(f"{GRAPH}:{stage}")
    assert answer.code == 0, answer.text[-3000:]
    assert answer.ran == [stage]
    assert min(steps_shown(answer.text, label)) >= second

    # The same training without an interruption, in another place.
    fresh = Study(tmp_path / "fresh")
    skipped = shutil.ignore_patterns(".dvc", ".git", ".ckpt", "mlflow.db*", "mlruns*", "students", "reports")
    shutil.copytree(study.folder, fresh.folder, ignore=skipped, symlinks=True)
    command = ("pipeline/train.py", "--params", PRESET, "--run", "distill", "--seed", "0")
    assert (answer := fresh.run(sys.executable, *command)).code == 0, answer.text
    place = Path("runs/smoke/students/distill/0/model.safetensors")
    weights = [
        hashlib.sha256((root / place).read_bytes()).hexdigest() for root in (study.folder, fresh.folder)
    ]
    assert weights[0] == weights[1]
    record = Path("metrics/smoke/train/distill/0")
    for name in ("metrics.json", "curve.csv"):
        assert (study.folder / record / name).read_bytes() == (fresh.folder / record / name).read_bytes()

    # Back to the short one; the stages that follow clear away what the long one has left.
    replace(study.folder / PRESET, preset)
    answer = study.repro(GRAPH)
    assert answer.code == 0, answer.text[-3000:]
    assert set(answer.ran) <= {"resolve@distill", stage, "predict@distill-0", *COLLECTORS}
    again = digests(study.folder / "runs/smoke/students/distill/0")
    assert again["model.safetensors"] == short["model.safetensors"]
    assert not list((study.folder / ".ckpt/smoke").glob("train-distill-0-*"))


def test_experiment_is_shown_in_the_same_database(study: Study) -> None:
    commit(study)
    assert study.runs("tags.`dvc.exp` != ''") == []
    answer = study.run("dvc", "exp", "run", GRAPH, "-S", f"{PRESET}:runs.scratch.learning_rate=0.0005")
    assert answer.code == 0, answer.text[-3000:]
    trained = {f"{stage}@scratch-{seed}" for stage in ("train", "predict") for seed in (0, 1)}
    assert set(answer.ran) == {"resolve@scratch", *trained, *COLLECTORS}
    shown = study.runs("tags.`dvc.exp` != ''")
    assert {run["tags"]["dvc.exp"] for run in shown} == {
        name for name in [run["tags"]["dvc.exp"] for run in shown] if name in answer.text
    }
    assert {run["tags"]["dvc.stage"].rpartition(":")[2] for run in shown} >= {
        "train@scratch-0",
        "train@scratch-1",
        "evaluate",
        "report",
    }
    assert {run["status"] for run in shown} == {"FINISHED"}


def test_server_shows_every_stage(study: Study, search: Callable[[str], list[dict[str, Any]]]) -> None:
    for stage in sorted(FAMILIES):
        found = search(f"tags.study = 'smoke' and tags.stage = '{stage}'")
        assert "FINISHED" in {run["status"] for run in found}, stage
    everything = search("tags.study = 'smoke'")
    assert {run["tags"].get("stage") for run in everything} == {*FAMILIES, None}  # None: the study's parent
    assert [run for run in everything if run["status"] == "RUNNING"] == []
    grid = {(run, seed) for run in METHODS for seed in ("0", "1")}
    trained = search("tags.study = 'smoke' and tags.stage = 'train' and attributes.status = 'FINISHED'")
    assert {(run["tags"]["run"], run["tags"]["seed"]) for run in trained} >= grid


def test_metrics_params_and_plots_are_shown(study: Study) -> None:
    metrics = study.run("dvc", "metrics", "diff", "--json", "--all")
    assert metrics.code == 0, metrics.text[-3000:]
    assert "test_accuracy.distill" in metrics.text
    params = study.run("dvc", "params", "diff", "--md")
    assert params.code == 0, params.text[-3000:]
    assert "runs.scratch.learning_rate" in params.text
    plots = study.run("dvc", "plots", "show", "--json", "metrics/smoke/train/distill/0/curve.csv")
    assert plots.code == 0, plots.text[-3000:]
    assert "validation_accuracy" in plots.text
    shown = study.run("dvc", "plots", "show", "--json", GRAPH)
    assert shown.code == 0, shown.text[-3000:]
    assert "Accuracy of each seed and their mean, study smoke" in shown.text
    table = study.run("dvc", "exp", "show", "--json")
    assert table.code == 0, table.text[-3000:]
    # Beside what DVC says of studies that have not been run.
    revisions, _ = json.JSONDecoder().raw_decode(table.text, table.text.index("[{"))
    assert len(revisions) == 2  # the working folder and the commit, which DVC reads without following links
    assert [revision.get("error") for revision in revisions] == [None, None]


@pytest.mark.filterwarnings("default")  # timm's own, while it is imported
def test_distilled_student_is_an_ordinary_timm_model(study: Study) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    folder = study.folder / "runs/smoke"
    student = folder / "students/distill/0"
    model = timm.create_model(f"local-dir:{student}", pretrained=True)
    description = study.json("runs/smoke/data/dataset.json")
    images = torch.from_numpy(np.load(folder / "data/test_images.npy")).float() / 255
    mean, std = (torch.tensor(description[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    stored = load_file(folder / "predictions/distill/0/test.safetensors")
    assert torch.equal(stored["examples"], torch.arange(len(images)))
    with torch.no_grad():
        logits = torch.cat([model.eval()(batch) for batch in ((images - mean) / std).split(500)])
    torch.testing.assert_close(logits, stored["logits"], rtol=1e-4, atol=1e-4)
    assert stored["logits"].std() > 0.1


def test_a_student_is_exported_with_what_was_measured(study: Study) -> None:
    command = (
        sys.executable,
        "-m",
        "attention_transfer",
        "export",
        "distill",
        "--params",
        PRESET,
        "--seed",
        "1",
    )
    answer = study.run(*command, "--onnx")
    assert answer.code == 0, answer.text
    assert "to the bit, on 64 test images" in answer.text
    folder = study.folder / "exports/smoke/distill-1"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "model.onnx", "model.safetensors")
    }
    scores = pd.read_csv(study.folder / "metrics/smoke/evaluate/scores.csv")
    own = scores[(scores["run"] == "distill") & (scores["seed"] == 1)]
    text = (folder / "README.md").read_text(encoding="utf-8")
    for which, name in (("test", "test"), ("shifts", "shifted test images")):
        value = 100 * own[own["set"] == which]["accuracy"].mean()
        assert re.search(rf"\| {name} \| [\d,]+ \| {value:.2f}", text), name
    refused = study.run(sys.executable, "-m", "attention_transfer", "export", "copy", "--params", PRESET)
    assert refused.code != 0
    assert "copies its teacher's attention" in refused.text


def test_misspelt_key_is_named(study: Study) -> None:
    lock = (study.folder / "studies/smoke/dvc.lock").read_bytes()
    with study.kept_file(PRESET):
        with study.edited() as values:
            run = values["runs"]["copy"]
            run["learning_rat"] = run.pop("learning_rate")
        answer = study.repro(GRAPH)
    assert answer.code != 0
    assert len(answer.ran) == 1  # it refuses before it does anything
    for part in (
        PRESET,
        "runs.copy.learning_rat: unknown key",
        "did you mean 'learning_rate'?",
        "What to do:",
    ):
        assert part in answer.text
    assert "Traceback" not in answer.text
    assert (study.folder / "studies/smoke/dvc.lock").read_bytes() == lock
    # DVC deletes a stage's outputs before it runs it: these alone come again.
    assert study.stages_run(GRAPH) == {"resolve@copy"}


def test_damaged_cache_is_named_and_mended(study: Study) -> None:
    shard = sorted((study.folder / "runs/smoke/cache/mae/views").glob("*.safetensors"))
    shard = [path for path in shard if path.stat().st_size > 100_000]
    (damaged,) = shard
    intact = damaged.read_bytes()
    content = bytearray(intact)
    content[len(content) // 2] ^= 1
    replace(damaged, bytes(content))
    answer = study.repro("--force", "--single-item", f"{GRAPH}:train@copy-0")
    assert answer.code != 0
    assert answer.ran == ["train@copy-0"]
    assert str(damaged.relative_to(study.folder)) in answer.text
    (remedy,) = re.findall(r"What to do: .*: (python -m attention_transfer remake .*)", answer.text)
    assert "Traceback" not in answer.text
    assert not (study.folder / "runs/smoke/students/copy/0/model.safetensors").exists()
    newest = study.runs("tags.stage = 'train' and tags.run = 'copy' and tags.seed = '0'")[0]
    assert newest["status"] == "FAILED"

    # What the message says to do mends it.
    assert (mended := study.run(*remedy.split())).ran == ["cache@mae"]
    assert mended.code == 0, mended.text[-3000:]
    assert damaged.read_bytes() == intact
    study.stages_run(GRAPH)
    assert (study.folder / "runs/smoke/students/copy/0/model.safetensors").exists()


def test_diverged_training_is_named(study: Study) -> None:
    with study.kept_file(PRESET):
        with study.edited() as values:
            values["runs"]["distill"]["attention_loss"]["weight"] = 1e38  # its product leaves float32
        answer = study.repro(f"{GRAPH}:train@distill-0")
    assert answer.code != 0
    assert answer.ran == ["resolve@distill", "train@distill-0"]
    assert re.search(r"the loss of train-distill-0 became (inf|nan) in epoch 1", answer.text)
    for part in (f"{PRESET}: runs.distill", "lower learning_rate"):
        assert part in answer.text
    assert "Traceback" not in answer.text
    newest = study.runs("tags.stage = 'train' and tags.run = 'distill' and tags.seed = '0'")[0]
    assert newest["status"] == "FAILED"
    assert not (study.folder / "runs/smoke/students/distill/0/model.safetensors").exists()


def test_missing_data_names_the_ways_out(study: Study, tmp_path: Path) -> None:
    dpkg = tmp_path / "dpkg"
    dpkg.write_text("#!/bin/sh\nexit 1\n")  # as dpkg -L answers where the package is not installed
    dpkg.chmod(0o755)
    (study.folder / "data/none").mkdir()
    nowhere = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    ) | {"no_proxy": "", "NO_PROXY": ""}
    with study.kept_file(PRESET):
        with study.edited() as values:
            values["data"]["folder"] = "data/none"
        path = f"{tmp_path}{os.pathsep}{study.environment['PATH']}"
        answer = study.repro("--single-item", f"{GRAPH}:data", **{"PATH": path, **nowhere})
    assert answer.code != 0
    assert answer.ran == ["data"]
    for part in (
        "do one of three things",
        "into data/none",
        "apt-get install dataset-fashion-mnist",
        "connection to the internet",
    ):
        assert part in answer.text
    assert "Traceback" not in answer.text
