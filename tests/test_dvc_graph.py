"""dvc.yaml tells the truth: a stage depends on the code that it uses and on the params that it reads."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from attention_transfer import config, graph_file, provenance
from attention_transfer.errors import StudyError

ROOT = Path(__file__).parent.parent
FULL = ROOT / "presets" / "full.yaml"
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
# One recipe a stage family, whether it is templated or not.
STAGES: dict[str, dict[str, Any]] = {
    name: {**stage, **stage.pop("do", {})} for name, stage in GRAPH["stages"].items()
}
PARAMS = "${where.params}"


def script(name: str) -> Path:
    return ROOT / "pipeline" / f"{name}.py"


def paths(entries: list[Any]) -> list[str]:
    """Names of deps or outputs, with or without options behind them."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def outputs(stage: dict[str, Any]) -> list[str]:
    return [path for kind in ("outs", "metrics", "plots") for path in paths(stage.get(kind, []))]


def listed_params(stage: dict[str, Any]) -> list[str]:
    (only,) = stage["params"]
    assert list(only) == [PARAMS]
    return [str(key) for key in only[PARAMS]]


def handed_params(path: Path) -> set[str]:
    """Dotted names that a script hands to `this.run(params=...)`, as far as they are written out.

    A name that is made when the script runs ends before its first unknown part: `runs.{name}` gives `runs`.
    """
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "run"
    ]
    (call,) = [call for call in calls if any(keyword.arg == "params" for keyword in call.keywords)]
    (params,) = [keyword.value for keyword in call.keywords if keyword.arg == "params"]
    keys = params.keys if isinstance(params, ast.Dict) else [getattr(params, "key", None)]
    names = set()
    for key in keys:
        if isinstance(key, ast.Constant):
            names.add(str(key.value))
        elif isinstance(key, ast.JoinedStr) and isinstance(key.values[0], ast.Constant):
            names.add(str(key.values[0].value).rstrip("."))
    assert names, f"{path}: no params are written out"
    return names


def covers(listed: str, handed: str) -> bool:
    """Whether a listed param is the handed one, holds it, or is one of its values (`runs.${key}`: `runs`)."""
    return listed == handed or handed.startswith(f"{listed}.") or listed.startswith(f"{handed}.")


def test_every_script_that_is_a_stage_is_in_the_graph() -> None:
    scripts = {
        path.stem
        for path in (ROOT / "pipeline").glob("*.py")
        if "run_script(" in path.read_text(encoding="utf-8")
    }
    assert scripts == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_code_that_is_used(name: str) -> None:
    code = [path for path in paths(STAGES[name]["deps"]) if path.startswith(("src/", "pipeline/"))]
    assert len(code) == len(set(code))
    used = {str(path.relative_to(ROOT)) for path in (script(name), *provenance.code_files(script(name)))}
    # Defaults of runs and teachers: `resolve` writes them out, and runs again when they change.
    defaults = {f"src/attention_transfer/config_{part}.py" for part in ("runs", "teachers")}
    used |= defaults if name == "resolve" else set()
    rooms = {room: {str(file.relative_to(ROOT)) for file in (ROOT / room).glob("*.py")} for room in code}
    rooms = {room: files for room, files in rooms.items() if files}
    assert not rooms or name in ("train", "predict", "finetuned"), "the others list what they use, no more"
    for room, files in rooms.items():
        assert 2 * len(used & files) > len(files), f"{room}: most of it is not used"
        assert not any((ROOT / room).glob("*/*.py")), f"{room}: holds other rooms"
    assert {file for path in code for file in rooms.get(path, {path})} >= used
    assert {path for path in code if path not in rooms} <= used
    assert {path for path in code if path not in rooms}.isdisjoint(set().union(*rooms.values()))


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[Path]]:
    """Files of the package that Python itself loads for each script, in one process for all of them."""
    program = (
        "import json, runpy, sys\n"
        "found = {}\n"
        "for script in sys.argv[1:]:\n"
        "    for name in [n for n in sys.modules if n.startswith('attention_transfer')]:\n"
        "        del sys.modules[name]\n"
        "    runpy.run_path(script, run_name='imported')\n"
        "    found[script] = [m.__file__ for n, m in sys.modules.items() if n.startswith('attention_transfer')]\n"
        "print(json.dumps(found))\n"
    )
    scripts = [str(script(name)) for name in STAGES]
    done = subprocess.run(
        [sys.executable, "-c", program, *scripts],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    return {Path(key).stem: set(map(Path, files)) for key, files in json.loads(done.stdout).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_imports_are_those_of_the_running_script(name: str, loaded: dict[str, set[Path]]) -> None:
    """The oracle for `imported_files`, which deps are compared with."""
    exempt = provenance.NEUTRAL | set((provenance.PACKAGE / "tracking").glob("*.py"))
    found = set(provenance.imported_files(script(name)))
    assert loaded[name] - exempt <= found
    # What is named in the source but not loaded is imported inside a function: the shifts, for scipy's sake; what
    # decodes images in files, for torch's; and all of training where no teacher is to be fine-tuned.
    decoder = ("decoding", "shared_pixels", "views", "workers")
    late = {path for path in found if path.stem in ("shifts", "corruptions", *decoder)}
    if name == "finetuned":
        fitting = provenance.PACKAGE / "fitting.py"
        late |= {fitting, provenance.PACKAGE / "training" / "machine.py", *provenance.imported_files(fitting)}
        assert fitting in found - loaded[name]
    assert found - loaded[name] <= late


@pytest.mark.parametrize("name", STAGES)
def test_command_names_the_study_and_nothing_of_the_machine(name: str) -> None:
    stage = STAGES[name]
    assert stage["desc"].strip()
    assert stage["wdir"] == "${where.root}"
    start = f"exec python pipeline/{name}.py --params {PARAMS}"
    assert stage["cmd"].startswith(start)
    # What is left tells instances apart; device, workers and launcher would rerun the study elsewhere.
    rest = re.findall(r" --(\w+) (\$\{[\w.]+\})", stage["cmd"].removeprefix(start))
    assert "".join(f" --{option} {value}" for option, value in rest) == stage["cmd"].removeprefix(start)
    assert {option for option, _ in rest} <= {"run", "seed", "teacher"}
    assert all(value in ("${key}", "${item.run}", "${item.seed}") for _, value in rest)


@pytest.mark.parametrize("name", STAGES)
def test_listed_params_are_in_the_study(name: str) -> None:
    sections = config.Study.model_fields
    for key in listed_params(STAGES[name]):
        section, *rest = key.split(".")
        assert section in sections
        if rest and not rest[0].startswith("${"):
            values: Any = sections[section].annotation
            assert rest[0] in values.model_fields, key


# What a script records beyond what it depends on: a run's resolved values hold teacher and attention, the
# data sets' hashes hold how they were drawn, and the first seed alone is no key of params.yaml.
RECORDED_ONLY = {"train": {"runs", "attention", "data"}, "predict": {"runs"}, "maps": {"seed"}}


@pytest.mark.parametrize("name", STAGES)
def test_recorded_params_are_listed(name: str) -> None:
    listed = listed_params(STAGES[name])
    recorded = handed_params(script(name)) - RECORDED_ONLY.get(name, set())
    assert recorded
    assert [key for key in sorted(recorded) if not any(covers(entry, key) for entry in listed)] == []


@pytest.mark.parametrize("name", STAGES)
def test_outputs_lie_under_the_name_of_the_study(name: str) -> None:
    assert outputs(STAGES[name])
    for path in outputs(STAGES[name]):
        assert "${name}" in path.split("/"), path
    own = {path for path in outputs(STAGES[name]) if path.startswith("metrics/")}
    assert {Path(path).name for path in own} >= {"run.json", "metrics.json"}


def test_records_stay_in_git() -> None:
    """Small records are not moved into DVC's cache, large outputs are."""
    for stage in STAGES.values():
        for kind in ("outs", "metrics", "plots"):
            for entry in stage.get(kind, []):
                path = paths([entry])[0]
                kept = isinstance(entry, dict) and entry[path].get("cache", True) is False
                assert kept == path.startswith(("metrics/", "reports/")), path


def test_dvc_shows_one_line_of_metrics_for_a_study_and_its_plots_exist() -> None:
    """A column for each value of each stage, and a plot for each curve, are too many to be looked at."""
    assert [name for name, stage in STAGES.items() if stage.get("metrics") or stage.get("plots")] == [
        "evaluate"
    ]
    accuracy, *figures = GRAPH["plots"]
    [(title, definition)] = accuracy.items()
    assert title == "accuracy, ${name}"
    [(source, column)] = definition["y"].items()
    made = {f"${{where.root}}/{path}" for path in outputs(STAGES["evaluate"])}
    assert source in made
    scores = (ROOT / "metrics/core/evaluate/scores.csv").read_text(encoding="utf-8").partition("\n")[0]
    assert {column, definition["x"], "set", "seed"} <= set(scores.split(","))
    template = json.loads(
        (ROOT / ".dvc/plots" / f"{definition['template']}.json").read_text(encoding="utf-8")
    )
    assert template["data"] == {"values": "<DVC_METRIC_DATA>"}
    for path in figures:
        assert (ROOT / path.replace("${where.root}", ".").replace("${name}", "core")).exists()
    for graph in (ROOT / "studies/full").glob("*/dvc.yaml"):
        stages = yaml.safe_load(graph.read_text(encoding="utf-8"))["stages"].values()
        assert not [stage for stage in stages if "metrics" in stage.get("do", stage)]


def test_graphs_are_as_their_writer_writes_them() -> None:
    writer = runpy.run_path(str(ROOT / "studies" / "graphs.py"))
    for path, text in writer["files"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python studies/graphs.py"


def test_each_experiment_has_a_graph() -> None:
    for preset in (ROOT / "presets").glob("*.yaml"):
        folder = ROOT / "studies" / preset.stem
        experiments = {path.name for path in folder.iterdir() if path.is_dir()}
        assert experiments == set(config.load(preset).experiments)
        for name, experiment in config.experiments(preset).items():
            where = yaml.safe_load((folder / name / "where.yaml").read_text(encoding="utf-8"))["where"]
            assert where["params"] == str(config.experiment_file(preset, name).relative_to(ROOT))
            assert where["own"] == experiment.name.replace("/", "/experiments/")
            assert where.get("teachers", []) == ([*experiment.cached_teachers] if experiment.own_data else [])


@pytest.mark.parametrize("name", ["full", *(f"full/{name}" for name in config.load(FULL).experiments)])
def test_a_written_graph_waits_for_its_own_teachers_and_for_no_other(name: str) -> None:
    """So that an experiment can be run without teachers that only another needs, and teacher by teacher."""
    study = config.load(ROOT / "presets" / f"{name}.yaml")
    runs = study.runs.values()
    used = {run.teacher for run in runs} | {run.initial for run in runs if run.initial}
    stages = yaml.safe_load((ROOT / "studies" / name / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    of_a_run = used if any(run.initial for run in runs) else {graph_file.OWN_TEACHER}
    for stage in ("resolve", "similarity", *(["maps"] if name == "full" else [])):
        deps = stages[stage].get("do", stages[stage])["deps"]
        waited_for = {Path(dep).name for dep in deps if "/teachers" in dep}
        assert waited_for == (of_a_run if stage == "resolve" else used)
        tutored = stage == "resolve" and any(run.method == "distill_logits" for run in runs)
        assert any(dep.endswith("/finetuned") for dep in deps) == tutored
    params = {key for entry in stages["resolve"]["do"]["params"] for keys in entry.values() for key in keys}
    assert {key for key in params if key.startswith("teachers")} == {f"teachers.{key}" for key in of_a_run}
    if name == "full":
        deps = stages["finetuned"]["deps"]
        tutors = {tutor.run.teacher for tutor in study.finetuned_teachers.values()}
        assert {Path(dep).name for dep in deps if "/teachers" in dep} == tutors


def test_a_graph_that_does_not_wait_for_a_teacher_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = config.load(FULL)
    with_another = config.experiments(FULL)["teacher_init"]
    with_tutor = config.experiments(FULL)["feature"]
    folder = tmp_path / "studies" / "full"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=r"(?s)studies/full/teacher_init: has no graph.*graphs\.py"):
        graph_file.check(with_another)
    shutil.copytree(ROOT / "studies" / "full", folder, symlinks=True)
    for each in (study, with_another, with_tutor):
        graph_file.check(each)
    shutil.copy(folder / "qkv" / "dvc.yaml", folder / "teacher_init" / "dvc.yaml")
    with pytest.raises(StudyError, match=r"teacher_init/dvc\.yaml: does not wait for \w+, which a run uses"):
        graph_file.check(with_another)
    shutil.copy(folder / "qkv" / "dvc.yaml", folder / "feature" / "dvc.yaml")
    with pytest.raises(StudyError, match="does not wait for the fine-tuned teachers"):
        graph_file.check(with_tutor)
    (folder / "dvc.yaml").unlink()
    shutil.copy(ROOT / "dvc.yaml", folder / "dvc.yaml")  # waits for all
    graph_file.check(study)


def test_each_study_has_the_same_graph() -> None:
    """What studies/graphs.py makes of it, in files: DVC follows no link in a committed revision."""
    folders = [path for path in (ROOT / "studies").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {"smoke"} <= {folder.name for folder in folders}
    for folder in folders:
        assert not [path for path in folder.rglob("*") if path.is_symlink() or path.name == "params.yaml"]
        preset = ROOT / "presets" / f"{folder.name}.yaml"
        for graph in folder.rglob("dvc.yaml"):
            where, params = yaml.safe_load(graph.read_text(encoding="utf-8"))["vars"]
            assert (graph.parent / where).exists()
            own = graph.parent.relative_to(ROOT / "studies").with_suffix(".yaml")
            assert (graph.parent / params).resolve() == ROOT / "presets" / own
        if not config.load(preset).experiments:
            text = (folder / "dvc.yaml").read_text(encoding="utf-8")
            stages = (ROOT / "dvc.yaml").read_text(encoding="utf-8").partition("stages:")[2]
            assert text.endswith(stages)
        where = yaml.safe_load((folder / "where.yaml").read_text(encoding="utf-8"))
        assert where == {"where": {"root": "../..", "params": f"presets/{folder.name}.yaml"}}
        assert config.load(preset).name == folder.name
    assert yaml.safe_load((ROOT / "where.yaml").read_text(encoding="utf-8")) == {
        "where": {"root": ".", "params": "params.yaml"}
    }
    assert config.load(ROOT / "params.yaml").name not in {folder.name for folder in folders}


def test_dvc_is_quiet_and_shares_no_file_with_its_cache() -> None:
    """With a hard link, damage to a working file would be in the cache too, from which DVC restores it."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / ".dvc" / "config")
    assert settings["core"]["analytics"] == "false"
    assert settings["core"]["check_update"] == "false"
    assert settings["cache"]["type"].strip('"') == "reflink,copy"
