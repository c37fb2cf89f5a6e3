"""One entry point: its help is quick, its exit codes and its JSON are what they are said to be."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from attention_transfer import __main__ as command
from attention_transfer import config
from attention_transfer.errors import StudyError

ROOT = Path(__file__).parents[1]
SECONDS = 0.3
# Of the packages that the project imports, those that take a tenth of a second or more.
HEAVY = (
    "torch",
    "timm",
    "numpy",
    "pandas",
    "scipy",
    "matplotlib",
    "pydantic",
    "mlflow",
    "dvc",
    "rich",
    "yaml",
)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of a command, or the message that it ends with."""
    monkeypatch.setattr(sys, "argv", ["attention_transfer", *arguments])
    try:
        command.main()
    except SystemExit as ended:
        return ended.code
    return 0


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with the params, records and the report of the default study."""
    for name in ("params.yaml", "presets", "studies", "dvc.yaml", "where.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("metrics", "reports"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "core").symlink_to(ROOT / name / "core")
    (tmp_path / "metrics" / "full").symlink_to(ROOT / "metrics" / "full")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_short_name_is_the_same_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(name, target)] = project["scripts"].items()
    module, _, function = target.partition(":")
    assert name == project["name"] == "attention-transfer"
    assert getattr(importlib.import_module(module), function) is command.main


@pytest.mark.parametrize(
    ("argv0", "name"),
    [("/x/bin/attention-transfer", "attention-transfer"), ("/x/__main__.py", "python -m attention_transfer")],
)
def test_help_calls_itself_as_it_was_called(
    argv0: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [argv0, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        command.main()
    assert capsys.readouterr().out.startswith(f"usage: {name} ")


def test_help_loads_nothing_heavy() -> None:
    """Of the whole, and of each command."""
    program = (
        "import contextlib, io, sys\n"
        "from attention_transfer.__main__ import COMMANDS, main\n"
        "for arguments in [[], *([name] for name in COMMANDS)]:\n"
        "    sys.argv = ['attention_transfer', *arguments, '--help']\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        main()\n"
        "    assert 'exit codes:' in out.getvalue(), arguments\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("arguments", [("check", "--params", "presets/full.yaml"), ("show",)])
def test_what_needs_no_model_loads_no_torch(arguments: tuple[str, ...], folder: Path) -> None:
    """It takes seconds to load, and `check` is the first thing that `make study` does."""
    program = (
        "import sys\n"
        "from attention_transfer.__main__ import main\n"
        f"sys.argv = ['attention_transfer', *{arguments!r}]\n"
        "main()\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_is_there_at_once() -> None:
    """Against the start of the interpreter: in time of the processor, since other tests run beside this one."""

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    bare = min(seconds("-c", "pass") for _ in range(5))
    least = min(seconds("-m", "attention_transfer", "--help") for _ in range(5))
    assert 0 < least - bare < SECONDS


@pytest.mark.parametrize(
    "arguments", [(), ("nonsense",), ("run", "--jobs", "0"), ("compare", "core"), ("show", "--nonsense")]
)
def test_what_is_no_command_ends_with_two(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "usage: " in capsys.readouterr().err


def test_a_problem_ends_with_one_and_a_program_can_read_it(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attention_transfer", "show", "--params", "none.yaml", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error == {
        "where": "none.yaml",
        "problem": "does not exist",
        "remedy": "give the path of a params.yaml",
    }
    assert done.stderr == "error: none.yaml: does not exist\n  What to do: give the path of a params.yaml\n"


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_signal_ends_with_its_number(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: object) -> None:
        raise raised

    monkeypatch.setitem(command.COMMANDS, "show", interrupted)
    assert run(monkeypatch, "show") == code


def test_whoever_reads_may_have_seen_enough() -> None:
    program = "import sys; from attention_transfer.__main__ import main, COMMANDS\n"
    program += "COMMANDS['show'] = lambda arguments: [print('line', flush=True) for _ in range(100_000)]\n"
    program += "sys.argv = ['attention_transfer', 'show']; main()"
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stderr is not None
    assert running.stdout.readline() == "line\n"
    running.stdout.close()
    assert running.wait(60) == 0
    assert running.stderr.read() == ""
    running.stderr.close()


def test_a_study_is_shown_to_a_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "show", "--json") == 0
    found = told(capsys)
    assert found["study"] == "core"
    rows = {row["run"]: row for row in found["runs"]}
    assert rows["scratch"]["seeds"] == 5
    for name, accuracy in json.loads(Path("metrics/core/evaluate/metrics.json").read_text()).items():
        assert rows[name.partition(".")[2]]["accuracy_mean"] == pytest.approx(accuracy, abs=1e-4)
    assert run(monkeypatch, "show", "--json", "--params", "presets/full/qkv.yaml") == 0
    values = told(capsys)["copy_query"]
    measured = json.loads(Path("metrics/full/evaluate/qkv/metrics.json").read_text())[
        "test_accuracy.copy_query"
    ]
    assert sum(values.values()) / len(values) == pytest.approx(measured, abs=1e-4)


def test_a_report_without_its_table_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "reports" / "core").unlink()
    shutil.copytree(ROOT / "reports" / "core" / "tables", folder / "reports" / "core" / "tables")
    table = folder / "reports" / "core" / "tables" / "main.md"
    assert run(monkeypatch, "show") == 0
    capsys.readouterr()
    table.write_text(table.read_text().partition("|")[0])
    assert "main.md: holds no table" in str(run(monkeypatch, "show"))


def test_a_cell_without_a_number_is_null(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has no nan."""
    (folder / "reports" / "core").unlink()
    shutil.copytree(ROOT / "reports" / "core" / "tables", folder / "reports" / "core" / "tables")
    (folder / "reports" / "core" / "tables" / "main.csv").write_text("run,a,b,c\nx,,inf,0.5\n")
    assert run(monkeypatch, "show", "--json") == 0
    assert told(capsys)["runs"] == [{"run": "x", "a": None, "b": None, "c": 0.5}]


def test_checks_plans_of_seeds_and_leftovers_are_for_programs_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "--json") == 0
    found = told(capsys)
    assert (found["study"], found["runs"], found["seeds"]) == ("core", 5, 5)
    assert found["attention"] == {"mae": "cache: params.yaml says so"}
    assert run(monkeypatch, "detectable", "--json") == 0
    rows = told(capsys)
    assert {"main/copy", "main/distill"} <= {row["claim"] for row in rows}
    assert all(row["smallest_detectable"] > 0 for row in rows)
    left = folder / "runs" / "core" / "students" / "gone" / "0"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"12345")
    for deleted in (False, True):
        assert run(monkeypatch, "prune", "--json", *(["--delete"] if deleted else [])) == 0
        [row] = told(capsys)["found"]
        assert row["path"] == "runs/core/students/gone"
        assert (row["bytes"], row["deleted"], left.exists()) == (5, deleted, not deleted)


def test_an_error_of_every_command_is_read_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: object) -> None:
        raise StudyError("is wrong", where="x.yaml: key", remedy="mend it")

    others = {"compare": ("a", "b"), "new": ("name", "--images", "x")}
    for name in command.FOR_PROGRAMS:
        monkeypatch.setitem(command.COMMANDS, name, fails)
        assert (
            run(monkeypatch, name, "--json", *others.get(name, ()))
            == "error: x.yaml: key: is wrong\n  What to do: mend it"
        )
        assert told(capsys) == {"error": {"where": "x.yaml: key", "problem": "is wrong", "remedy": "mend it"}}


@pytest.mark.parametrize(
    ("given", "meant"), [("smoke", "smoke"), ("presets/smok.yaml", "smoke"), ("tunes.yml", "tune")]
)
def test_a_params_file_that_is_not_there_may_be_a_preset(
    given: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(StudyError, match=f"did you mean presets/{meant}.yaml"):
        config.load(given)
