"""Plans, runs and shows a study of attention transfer; `dvc repro` does its work by itself, too."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from attention_transfer.errors import StudyError

if TYPE_CHECKING:
    from attention_transfer.config import Study


def check(arguments: argparse.Namespace) -> None:
    """Checks a params.yaml as a whole, shapes and disk room included, and says what the caches will take.

    Also mends DVC's lock file after a kill, and removes checkpoints that are done with.
    """
    from attention_transfer.commands import check

    check.show(arguments.params, as_json=arguments.json)


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
    if arguments.json:
        print(json.dumps({"params": str(preset), "study": arguments.name}))
    else:
        print(f"{preset} is written: look it through.\nThen: make study STUDY={arguments.name}")


def show(arguments: argparse.Namespace) -> None:
    """Prints the main table and where the report is; of an experiment, the accuracies of its runs."""
    from attention_transfer import config
    from attention_transfer.commands import show

    show.show(config.load(arguments.params), str(arguments.params), as_json=arguments.json)


def forecast(arguments: argparse.Namespace) -> None:
    """Measures a few steps here, and says what caches and stages will take, before anything is made.

    With --gpus nothing is measured: it says what the study would take on so many GPUs, from formulas of floating-point
    operations, memory and disk, and from the rates that are stated.
    """
    from attention_transfer import config
    from attention_transfer.layout import Layout

    study, found = config.load(arguments.params), config.experiments(arguments.params)
    if arguments.once and (Layout.of(study).own / "students").is_dir():
        return
    if study.is_experiment:
        study = study.with_used_teachers()
    if arguments.gpus:
        _forecast_gpus(arguments, study, list(found))
        return
    if stated := [f"--{name.replace('_', '-')}" for name in STATED if getattr(arguments, name) is not None]:
        raise StudyError(
            "is for a plan that measures nothing", where=stated[0], remedy="add --gpus, such as --gpus 8"
        )
    from attention_transfer.commands import forecast

    forecast.show(study, found, arguments.params, as_json=arguments.json, keep=arguments.once)


def _forecast_gpus(arguments: argparse.Namespace, study: Study, experiments: list[str]) -> None:
    from attention_transfer.commands import forecast_gpus

    rates = forecast_gpus.rates(
        tflops=arguments.tflops,
        memory=arguments.gpu_memory,
        cores=arguments.cores,
        decoded=arguments.images_per_core,
        node=arguments.node,
    )
    forecast_gpus.show(
        study,
        experiments,
        arguments.params,
        numbers=arguments.gpus,
        rates=rates,
        images=dict(arguments.images or ()),
        classes=arguments.classes,
        as_json=arguments.json,
    )


def detectable(arguments: argparse.Namespace) -> None:
    """Says which differences the study's seeds can find, from the spread of seeds in a study that has run."""
    from attention_transfer import config
    from attention_transfer.commands import detectable

    found = config.experiments(arguments.params)
    study, pilot = config.load(arguments.params), config.load(arguments.pilot)
    detectable.show(study, found, pilot, as_json=arguments.json)


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

    if problems := verify.verify(config.load(arguments.params), as_json=arguments.json):
        sys.exit("\n".join(f"error: {problem}" for problem in problems))


def export(arguments: argparse.Namespace) -> None:
    """Writes a trained student, or a fine-tuned teacher, as a folder that timm opens, with a model card."""
    from attention_transfer import config, lock_file
    from attention_transfer.commands import export

    # So that what is unfinished is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    study = config.load(arguments.params)
    graph = lock_file.path(study.name).with_name("dvc.yaml")
    wishes = export.Wishes(
        folder=arguments.out,
        onnx=arguments.onnx,
        push=arguments.push,
        public=arguments.public,
        licence=arguments.license,
    )
    before = "" if graph == Path("dvc.yaml") else f"{graph}:"
    export.export(study, arguments.name, arguments.seed, wishes, graph=before)


def remake(arguments: argparse.Namespace) -> None:
    """Makes the outputs of one stage anew, whatever DVC takes them for: for damaged files."""
    from attention_transfer.commands import remake

    sys.exit(bool(remake.remake(arguments.stage)))


def run(arguments: argparse.Namespace) -> None:
    """Does what `dvc repro` does, with several stages at a time: shows their speed and the time left."""
    from attention_transfer.commands import repro

    sys.exit(repro.repro(_graph(arguments.params), arguments.jobs, arguments.only))


def report(arguments: argparse.Namespace) -> None:
    """Makes the report anew of what has been run, experiments of which some have not been run included."""
    graph = _graph(arguments.params)
    stage = f"{graph}:report"
    command = [sys.executable, "-m", "dvc", "repro", "--quiet", "--single-item", stage]
    if subprocess.run(command, check=False).returncode:
        raise StudyError(
            "the report could not be made: what it is made of is missing, or its stage failed",
            where=stage,
            remedy=f"run the study (dvc repro {graph}), or see what is the matter: dvc repro --single-item {stage}",
        )
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
    study = config.load(arguments.params)
    prune.show(study, [*found.values()], delete_too=arguments.delete, as_json=arguments.json)


def sync(arguments: argparse.Namespace) -> None:
    """Shows every recorded run in MLflow that is not there yet."""
    from attention_transfer import tracking

    report = tracking.sync(Path("metrics"), Path(), _locks())
    print(json.dumps(asdict(report)) if arguments.json else report)


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

    tracking.check_free(Path(), port=arguments.port, host=arguments.host)
    print("bringing the records under metrics/ into MLflow ..", flush=True)
    sync(argparse.Namespace(json=False))
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
    "export": export,
    "remake": remake,
    "run": run,
    "report": report,
    "prune": prune,
    "sync": sync,
    "ui": ui,
}


STUDY_OF = (
    "doctor",
    "status",
    "check",
    "show",
    "plan",
    "detectable",
    "verify",
    "export",
    "prune",
    "run",
    "report",
)
STATED = ("tflops", "gpu_memory", "cores", "images_per_core", "node", "images", "classes")
"""Of `plan --gpus`."""
FOR_PROGRAMS = ({*STUDY_OF} - {"run", "export"}) | {"new", "compare", "sync"}
EXIT_CODES = """exit codes:
  0    done, and in order
  1    a problem: the message says what it is, where, and what to do; --json has it as {"error": ..}
  2    no such command or argument
  128+ a signal came, such as Ctrl-C (130): what was at work is saved, the same command goes on
"""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: give 1 or more")
    return int(text)


def _rate(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return found


def _counted(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    return name, _count(number)


def _describe_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--once",
        action="store_true",
        help="do nothing where students have been trained already; else keep the forecast for MLflow",
    )
    stated = command.add_argument_group(
        "on GPUs that are not here", "what you do not state is left out of the answer"
    )
    stated.add_argument(
        "--gpus", type=_count, nargs="+", metavar="N", help="how many; several numbers: a row each"
    )
    stated.add_argument(
        "--tflops",
        type=_rate,
        metavar="F",
        help="10^12 a second that one reaches: its peak times the share of it",
    )
    stated.add_argument("--gpu-memory", type=_rate, metavar="GB", help="of one")
    stated.add_argument("--cores", type=_count, metavar="N", help="that a machine has for each of its GPUs")
    stated.add_argument(
        "--images-per-core", type=_rate, metavar="F", help="images a second that a core decodes and augments"
    )
    stated.add_argument("--node", type=_count, metavar="N", help="GPUs of one machine (default: 8)")
    stated.add_argument(
        "--images",
        type=_counted,
        nargs="+",
        metavar="SET=N",
        help="images of train, test and published sets that have not been read yet",
    )
    stated.add_argument("--classes", type=_count, metavar="N", help="of images that have not been read yet")


def _describe_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="RUN", help="a run, or one of finetuned_teachers")
    command.add_argument("--seed", type=int, help="of the student (default: the study's first)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default: exports/<study>/<run>-<seed>")
    command.add_argument("--onnx", action="store_true", help="writes model.onnx too, and checks it")
    command.add_argument(
        "--license", metavar="ID", help="of the model, as the Hugging Face hub names it, such as apache-2.0"
    )
    command.add_argument(
        "--push", metavar="OWNER/NAME", help="uploads it to the Hugging Face hub, where you alone may read it"
    )
    command.add_argument("--public", action="store_true", help="with --push: anyone may read it")


def _parser() -> argparse.ArgumentParser:
    installed = Path(sys.argv[0]).name == "attention-transfer"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="attention-transfer" if installed else "python -m attention_transfer",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, function in COMMANDS.items():
        text = _text_of(function)
        command = commands.add_parser(
            name, help=text.splitlines()[0], description=text, epilog=EXIT_CODES, formatter_class=formatter
        )
        if name in STUDY_OF:
            command.add_argument(
                "--params",
                type=Path,
                default=Path("params.yaml"),
                metavar="FILE",
                help="the study (default: params.yaml)",
            )
        if name in FOR_PROGRAMS:
            command.add_argument("--json", action="store_true", help="for a program to read")
    _arguments(commands.choices)
    return parser


def _text_of(function: Callable[[argparse.Namespace], None]) -> str:
    """A command's docstring, without its indentation."""
    return "\n".join(line.strip() for line in (function.__doc__ or function.__name__).strip().splitlines())


def _arguments(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """What single commands take beside the study."""
    _describe_plan(commands["plan"])
    commands["detectable"].add_argument(
        "--pilot",
        type=Path,
        default=Path("params.yaml"),
        metavar="FILE",
        help="a study that has run (default: params.yaml)",
    )
    for which in ("first", "second"):
        commands["compare"].add_argument(
            which, help="a study (core, full, full/qkv), a revision of the default study, or REVISION:STUDY"
        )
    commands["new"].add_argument("name", help="of the study, such as flowers")
    commands["new"].add_argument(
        "--images", type=Path, required=True, help="folder with train/<class>/*.jpg and test/<class>/*.jpg"
    )
    commands["new"].add_argument("--size", type=int, help="of the images, in pixels (default: 64 or less)")
    commands["new"].add_argument(
        "--teacher",
        help="timm:<entry>.<tag>, hf-hub:<owner>/<model>, or a file (default: it is pre-trained on the images)",
    )
    commands["new"].add_argument(
        "--heads",
        type=int,
        help="of a teacher in a file, whose weights do not tell (default: those of its format)",
    )
    commands["new"].add_argument(
        "--format", help="whose layout the file has, such as mae, where it does not tell (docs/teachers.md)"
    )
    _describe_export(commands["export"])
    commands["remake"].add_argument("stage", help="as DVC names it, such as train@copy-0")
    commands["run"].add_argument("--jobs", type=_count, default=1, help="stages at a time (default: 1)")
    commands["run"].add_argument(
        "--only",
        metavar="STAGE",
        nargs="+",
        default=(),
        help="families of stages, such as train, and what they depend on",
    )
    commands["prune"].add_argument("--delete", action="store_true", help="delete it, too")
    commands["ui"].add_argument("--port", type=int, default=5000, help="default: 5000")
    commands["ui"].add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")


def main() -> None:
    """Entry point of `python -m attention_transfer`, and of `attention-transfer` where it is installed."""
    arguments = _parser().parse_args()
    try:
        COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except StudyError as error:
        if getattr(arguments, "json", False):
            values = {"where": error.where, "problem": error.problem, "remedy": error.remedy}
            print(json.dumps({"error": values}, ensure_ascii=False))
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of `.. | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
