"""Commands beside `dvc repro`: check and plan a study, verify its caches, tidy up, show results and runs."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from attention_transfer.errors import StudyError


def check(arguments: argparse.Namespace) -> None:
    """Checks the whole file, shapes and disk room included, and says what the caches will take.

    Also mends DVC's lock file after a kill, and removes checkpoints that are done with.
    """
    from attention_transfer import config, graph_file, lock_file, plan
    from attention_transfer.layout import Layout

    study, experiments = config.load(arguments.params), config.experiments(arguments.params)
    graph_file.check(study)
    for each in experiments.values():
        graph_file.check(each)
    for each in (study, *experiments.values()):
        if count := lock_file.mend(each.name):
            print(f"{lock_file.path(each.name)}: put back {count} stages that were cut off")
        lock_file.forget_checkpoints(each.name)
    reserved = plan.check_room(study, Layout.of(study), arguments.params)
    for name, each in experiments.items():
        if each.own_data:
            file = config.experiment_file(arguments.params, name)
            reserved = plan.check_room(each, Layout.of(each), file, reserved=reserved)
    for name in study.transferred_from if study.is_experiment else study.teachers:
        print(f"attention of {name}: {plan.attention_source(study, name)}")
    if note := plan.unread_views(study):
        print(note)
    print(
        f"{arguments.params}: study {study.name}, {len(study.runs)} runs x {len(study.seeds)} seeds, is in order"
    )
    for name, experiment in experiments.items():
        print(f"experiment {name}: {len(experiment.runs)} runs x {len(experiment.seeds)} seeds")


def new(arguments: argparse.Namespace) -> None:
    """Writes a study of a folder of images, and of a teacher of one's own."""
    from attention_transfer.commands import new

    preset = new.write(
        arguments.name,
        arguments.images,
        size=arguments.size,
        teacher=arguments.teacher,
        heads=arguments.heads,
        format=arguments.format,
    )
    print(f"{preset} is written: look it through.\nThen: make study STUDY={arguments.name}")


def show(arguments: argparse.Namespace) -> None:
    """Prints the main table and where the report is; of an experiment, the accuracies of its runs."""
    from attention_transfer import config
    from attention_transfer.layout import Layout

    study = config.load(arguments.params)
    report = Layout.of(study).report
    if study.is_experiment:
        from attention_transfer.commands import show_experiment

        print(show_experiment.text(study))
        return
    table = report / "tables" / "main.md"
    if not table.exists():
        raise StudyError("has no report yet", where=str(arguments.params), remedy="run: dvc repro")
    print(table.read_text(encoding="utf-8"))
    print(f"Report:    {(report / 'report.html').resolve()}\nMLflow UI: make ui")


def forecast(arguments: argparse.Namespace) -> None:
    """Measures a few steps here, and says what caches and stages will take, before anything is made."""
    from attention_transfer import config
    from attention_transfer.layout import Layout

    study, found = config.load(arguments.params), config.experiments(arguments.params)
    if arguments.once and (Layout.of(study).own / "students").is_dir():
        return
    if study.is_experiment:
        study = study.with_used_teachers()
    from attention_transfer.commands import forecast

    forecast.show(study, found, arguments.params, as_json=arguments.json, keep=arguments.once)


def detectable(arguments: argparse.Namespace) -> None:
    """Says which differences the study's seeds can find, from the spread of seeds in a study that has run."""
    from attention_transfer import config
    from attention_transfer.commands import detectable

    found = config.experiments(arguments.params)
    detectable.show(config.load(arguments.params), found, config.load(arguments.pilot))


def doctor(arguments: argparse.Namespace) -> None:
    """Looks whether this machine, the packages, the params, the images and the disk are in order; says what to do."""
    from attention_transfer.commands import doctor

    sys.exit(doctor.show(arguments.params, as_json=arguments.json))


def status(arguments: argparse.Namespace) -> None:
    """Says which stages would run now and why, which may follow, and how long they took the last time."""
    from attention_transfer import config, lock_file
    from attention_transfer.commands import status
    from attention_transfer.layout import Layout

    study = config.load(arguments.params)
    graph = lock_file.path(study.name).with_name("dvc.yaml")
    status.show(graph, Layout.of(study).metrics, as_json=arguments.json)


def compare(arguments: argparse.Namespace) -> None:
    """Says what differs between two studies, or two revisions: params, and results with intervals."""
    from attention_transfer.commands import compare

    compare.show(arguments.first, arguments.second, as_json=arguments.json)


def verify(arguments: argparse.Namespace) -> None:
    """Checks every byte of the attention caches, and recomputes a sample of their rows."""
    from attention_transfer import config
    from attention_transfer.commands import verify

    if problems := verify.verify(config.load(arguments.params)):
        sys.exit("\n".join(f"error: {problem}" for problem in problems))


def remake(arguments: argparse.Namespace) -> None:
    """Makes the outputs of one stage anew, whatever DVC takes them for: for damaged files."""
    from attention_transfer.commands import remake

    sys.exit(remake.remake(arguments.stage))


def run(arguments: argparse.Namespace) -> None:
    """Does what `dvc repro` does, with several stages at a time: shows their speed and the time left."""
    from attention_transfer.commands import repro

    sys.exit(repro.repro(_graph(arguments.params), arguments.jobs, arguments.only))


def report(arguments: argparse.Namespace) -> None:
    """Makes the report anew of what has been run, experiments of which some have not been run included."""
    graph = _graph(arguments.params)
    stage = f"{graph}:report"
    command = [sys.executable, "-m", "dvc", "repro", "--quiet", "--single-item", stage]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
    show(arguments)


def _graph(params: Path) -> Path:
    """The study's dvc.yaml."""
    from attention_transfer import config, lock_file

    return lock_file.path(config.load(params).name).with_name("dvc.yaml")


def prune(arguments: argparse.Namespace) -> None:
    """Lists what no entry of params.yaml needs any longer, with its size; with --delete, deletes it."""
    from attention_transfer import config
    from attention_transfer.commands import prune

    found = config.experiments(arguments.params)
    prune.show(config.load(arguments.params), [*found.values()], delete_too=arguments.delete)


def sync(arguments: argparse.Namespace) -> None:
    """Shows every recorded run in MLflow that is not there yet."""
    from attention_transfer import tracking

    print(tracking.sync(Path("metrics"), Path(), _locks()))


def _locks() -> dict[str, list[Path]]:
    """The lock files of each study that has one, those of its experiments among them."""
    found: dict[str, list[Path]] = {}
    for path in sorted(Path("studies").glob("**/dvc.lock")):
        found.setdefault(path.parts[1], []).append(path)
    if Path("dvc.lock").exists():
        from attention_transfer import config

        found[config.load("params.yaml").name] = [Path("dvc.lock")]
    return found


def ui(arguments: argparse.Namespace) -> None:
    """Serves MLflow's pages on this machine."""
    from attention_transfer import tracking

    sync(arguments)
    address = f"http://{arguments.host}:{arguments.port}"
    print(f"MLflow UI: {address} (ready in about half a minute; Ctrl-C ends it)")
    for study in sorted(path.parent.name for path in Path("metrics").glob("*/train")):
        for title, link in tracking.links(address, study).items():
            print(f"  {title:24} {link}")
    sys.stdout.flush()
    tracking.serve(Path(), port=arguments.port, host=arguments.host)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "doctor": doctor,
    "new": new,
    "check": check,
    "show": show,
    "plan": forecast,
    "status": status,
    "detectable": detectable,
    "compare": compare,
    "verify": verify,
    "remake": remake,
    "run": run,
    "report": report,
    "prune": prune,
    "sync": sync,
    "ui": ui,
}


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of stages: give 1 or more")
    return int(text)


def main() -> None:
    """Entry point of `python -m attention_transfer`."""
    parser = argparse.ArgumentParser(prog="python -m attention_transfer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        if name in (
            "doctor",
            "status",
            "check",
            "show",
            "plan",
            "detectable",
            "verify",
            "prune",
            "run",
            "report",
        ):
            command.add_argument("--params", type=Path, default=Path("params.yaml"))
    for name in ("plan", "status", "compare", "doctor"):
        commands.choices[name].add_argument("--json", action="store_true", help="for a program to read")
    commands.choices["plan"].add_argument(
        "--once",
        action="store_true",
        help="nothing where students have been trained already; else kept for MLflow",
    )
    commands.choices["detectable"].add_argument(
        "--pilot", type=Path, default=Path("params.yaml"), help="a study that has run (default: params.yaml)"
    )
    for which in ("first", "second"):
        commands.choices["compare"].add_argument(
            which, help="a study (core, full, full/qkv), a revision of the default study, or REVISION:STUDY"
        )
    commands.choices["new"].add_argument("name", help="of the study, such as flowers")
    commands.choices["new"].add_argument(
        "--images", type=Path, required=True, help="folder with train/<class>/*.jpg and test/<class>/*.jpg"
    )
    commands.choices["new"].add_argument(
        "--size", type=int, help="of the images, in pixels (default: 64 or less)"
    )
    commands.choices["new"].add_argument(
        "--teacher",
        help="timm:<entry>.<tag>, hf-hub:<owner>/<model>, or a file (default: it is pre-trained on the images)",
    )
    commands.choices["new"].add_argument(
        "--heads",
        type=int,
        help="of a teacher in a file, whose weights do not tell (default: those of its format)",
    )
    commands.choices["new"].add_argument(
        "--format", help="whose layout the file has, such as mae, where it does not tell (docs/teachers.md)"
    )
    commands.choices["remake"].add_argument("stage", help="as DVC names it, such as train@copy-0")
    commands.choices["run"].add_argument("--jobs", type=_jobs, default=1, help="stages at a time")
    commands.choices["run"].add_argument(
        "--only",
        metavar="STAGE",
        nargs="+",
        default=(),
        help="families of stages, such as train, and what they depend on",
    )
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
