"""Commands beside `dvc repro`: check params.yaml, print results, tidy up, and show the runs in MLflow."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout


def check(arguments: argparse.Namespace) -> None:
    """Checks the whole file, shapes and disk room included, and says what the caches will take."""
    from attention_transfer import config, plan

    study = config.load(arguments.params)
    plan.check_room(study, Layout(study.name), arguments.params)
    for name, size in plan.cache_sizes(study).items():
        print(
            f"cache of {name}: {size / 1e9:.2f} GB of training views, of {study.attention.budget_gb} GB allowed"
        )
    print(
        f"{arguments.params}: study {study.name}, {len(study.runs)} runs x {len(study.seeds)} seeds, is in order"
    )


def show(arguments: argparse.Namespace) -> None:
    """Prints the main table and where the report is."""
    from attention_transfer import config

    study = config.load(arguments.params)
    report = Layout(study.name).report
    table = report / "tables" / "main.md"
    if not table.exists():
        raise StudyError("has no report yet", where=str(arguments.params), remedy="run: dvc repro")
    print(table.read_text(encoding="utf-8"))
    print(f"Report:    {(report / 'report.html').resolve()}\nMLflow UI: make ui")


def prune(arguments: argparse.Namespace) -> None:
    """Deletes outputs of runs, seeds and teachers that params.yaml no longer names."""
    from attention_transfer import config

    study = config.load(arguments.params)
    layout = Layout(study.name)
    seeds = {str(seed) for seed in study.seeds}
    stale = [
        path
        for root in (layout.artifacts, layout.metrics)
        for family, names in (
            *(
                (family, set(study.runs))
                for family in ("students", "predictions", "train", "predict", "resolve")
            ),
            *((family, set(study.teachers)) for family in ("teachers", "cache", "pretrain")),
        )
        for path in _below(root / family)
        if path.name not in names
    ]
    for family in ("students", "predictions"):
        for run in study.runs:
            stale += [path for path in _below(layout.artifacts / family / run) if path.name not in seeds]
    for family in ("train", "predict"):
        for run in study.runs:
            stale += [path for path in _below(layout.metrics / family / run) if path.name not in seeds]
    stale += [path for path in layout.artifacts.glob("resolved/*.json") if path.stem not in study.runs]
    for path in stale:
        print(f"{'delete' if arguments.delete else 'would delete'} {path}")
        if arguments.delete:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if stale and not arguments.delete:
        print("nothing is deleted yet: add --delete")


def _below(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def sync(arguments: argparse.Namespace) -> None:
    """Shows every recorded run in MLflow that is not there yet."""
    from attention_transfer import tracking

    print(tracking.sync(Path("metrics"), Path(), _locks()))


def _locks() -> dict[str, Path]:
    """The lock file of each study that has one."""
    found = {path.parent.name: path for path in Path("studies").glob("*/dvc.lock")}
    if Path("dvc.lock").exists():
        from attention_transfer import config

        found[config.load("params.yaml").name] = Path("dvc.lock")
    return found


def ui(arguments: argparse.Namespace) -> None:
    """Serves MLflow's pages on this machine."""
    from attention_transfer import tracking

    sync(arguments)
    print(
        f"MLflow UI: http://{arguments.host}:{arguments.port} (ready in about half a minute; Ctrl-C ends it)"
    )
    sys.stdout.flush()
    tracking.serve(Path(), port=arguments.port, host=arguments.host)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": check,
    "show": show,
    "prune": prune,
    "sync": sync,
    "ui": ui,
}


def main() -> None:
    """Entry point of `python -m attention_transfer`."""
    parser = argparse.ArgumentParser(prog="python -m attention_transfer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        if name in ("check", "show", "prune"):
            command.add_argument("--params", type=Path, default=Path("params.yaml"))
    commands.choices["prune"].add_argument("--delete", action="store_true")
    commands.choices["ui"].add_argument("--port", type=int, default=5000)
    commands.choices["ui"].add_argument("--host", default="127.0.0.1")
    arguments = parser.parse_args()
    try:
        COMMANDS[arguments.command](arguments)
    except StudyError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
