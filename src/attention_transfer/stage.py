"""What every script in pipeline/ shares: arguments, the checked study, records, tracking, exit codes.

Scripts import it before anything heavy: Python's garbage collector, which finds nothing while torch and timm
are imported, takes a fifth of that time.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import datetime
import functools
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from attention_transfer import (
    cluster,
    config,
    launching,
    lock_file,
    machine_file,
    provenance,
    run_record,
    tracking,
)
from attention_transfer.errors import StudyError
from attention_transfer.files import fingerprint, write_json, write_text
from attention_transfer.layout import Layout

gc.disable()  # until `run_script`

STARTED = time.time()  # the interpreter's own start is 0.1 s back; what the kernel knows of it can be 1 s off

SECONDS_BEFORE_SHOWN = 5.0  # mlflow takes 3 s to import and open, too much for work that takes seconds


@dataclass
class Stage:
    """One stage at work.

    Attributes:
        name: of the stage family, such as `train`.
        instance: what tells this instance from the others, such as run and seed.
        study: the whole params.yaml, checked.
        started: when the script began, imports included; seconds since 1970.
        params: the part of it that this stage's result depends on, resolved.
        paths: which of several equal computations ran, for the record.
        outputs: files outside the record's folder for which run.json vouches.
        alone: why one process does it although the machine has several.
    """

    name: str
    instance: dict[str, Any]
    study: config.Study
    params_file: Path
    script: Path
    layout: Layout
    started: float = STARTED
    tracker: tracking.Tracker = field(default_factory=tracking.Unshown)
    params: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    outputs: list[Path] = field(default_factory=list)
    alone: str = ""

    @property
    def record(self) -> Path:
        """Folder of run.json, metrics.json and curve.csv."""
        return self.layout.record(self.name, *self.instance.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides this stage's result: params, inputs and code, as the work began."""
        return fingerprint(
            [self.name, self.instance, self.params, self.inputs, provenance.code_fingerprint(self.script)]
        )

    def checkpoints(self) -> Path:
        """Folder for checkpoints of this very computation: another fingerprint has another folder."""
        root = Path(os.environ.get("DVC_ROOT", "."))
        return root / ".ckpt" / self.study.name / f"{self.label}-{self.fingerprint}"

    @property
    def writes(self) -> bool:
        """Whether this process writes the stage's outputs: the only one, or the first of several."""
        return launching.number() == 0

    @property
    def label(self) -> str:
        return "-".join(self.record.relative_to(self.layout.metrics).parts)

    def where(self, key: str) -> str:
        """A key of params.yaml, for error messages."""
        return f"{self.params_file}: {key}"

    def run(
        self,
        *,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[], Mapping[str, Any]],
        live: bool,
        patience: float = SECONDS_BEFORE_SHOWN,
    ) -> None:
        """Does the stage's work under tracking, then writes its records, run.json last.

        Of several processes, all work, and the first tracks and writes.

        Args:
            params: by dotted name in params.yaml, everything that changes the result.
            inputs: hashes of what the stage reads, by name.
            work: does it, and returns the stage's metrics.
            live: show it in MLflow while it runs. Stages that take seconds leave their record to the
                report's `sync`.
            patience: seconds of work before it is shown live; what ends sooner is left to `sync` too.
        """
        self.params, self.inputs = dict(params), dict(inputs)
        if not self.writes:
            work()
            return
        kept = self.checkpoints() / "mlflow_run_id"
        with (
            self._tracked(kept, patience)
            if live
            else contextlib.nullcontext(tracking.Unshown()) as self.tracker
        ):
            metrics = work()
            write_json(self.record / "metrics.json", dict(metrics))
            shown = {key: value for key, value in metrics.items() if value is not None}
            self.tracker.log_metrics(shown, step=int(metrics.get("epochs", 0)))
            self.write_run()
            for file in ("run.json", "curve.csv"):
                if (path := self.record / file).exists():
                    self.tracker.log_artifact(path)
        if self.checkpoints().exists():
            write_text(self.checkpoints() / lock_file.DONE, str(self.record / "run.json"))

    def _tracked(self, kept: Path, patience: float) -> contextlib.AbstractContextManager[tracking.Tracker]:
        run_id = kept.read_text().strip() if kept.exists() else None
        return tracking.start(
            study=self.layout.base,
            stage=self.name,
            name=self.label,
            params=self.params,
            fingerprint=self.fingerprint,
            seed=self.instance.get("seed"),
            run=self.instance.get("run"),
            inputs=self.inputs,
            resume_run_id=run_id,
            opened=lambda opened: write_text(kept, opened),
            patience=0.0 if run_id else patience,
            root=Path(),
        )

    def _running(self) -> dict[str, Any]:
        """Processes of this stage, and what else machine.yaml or the environment has chosen."""
        why = {"alone": self.alone} if self.alone else {}
        return {**machine_file.settings().choices(), "processes": launching.count(), **why}

    def write_run(self) -> None:
        """run.json: how this result came about. Only the report, `sync` and `choose` read it."""
        beside = (path for path in self.record.iterdir() if path.suffix in (".json", ".csv"))
        run_record.write(
            self.record,
            {
                "stage": self.name,
                "study": self.layout.base,
                **({"experiment": self.layout.experiment} if self.layout.experiment else {}),
                **self.instance,
                "fingerprint": self.fingerprint,
                "params": _nested(self.params),
                "inputs": self.inputs,
                "paths": self.paths,
                **provenance.git_state(),
                "dvc": provenance.dvc_stage(),
                "versions": provenance.versions(),
                "machine": {**provenance.machine(), **self._running()},
                "started": datetime.datetime.fromtimestamp(self.started, datetime.UTC).isoformat(
                    timespec="seconds"
                ),
                "seconds": round(time.time() - self.started, 2),
                "peak_memory_mb": provenance.peak_memory_mb(),
            },
            [*sorted(path for path in beside if path.name != run_record.RUN), *self.outputs],
        )


def _nested(params: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in params.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


_exit_code: list[int] = []  # once it is known


@contextlib.contextmanager
def _ends_without_teardown() -> Iterator[None]:
    """The process ends with this block's success or SystemExit, and `_skip_teardown`; with other errors as usual."""
    try:
        yield
    except SystemExit as ended:
        _exit_code.append(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise
    _exit_code.append(0)


@atexit.register
def _skip_teardown() -> None:
    """Ends a stage without taking its millions of objects apart, in which gloo's threads abort some processes.

    The first handler to be registered is the last to run: nothing that others do at exit is left out.
    """
    if _exit_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_code[0])


def _collect_garbage() -> None:
    """Turns the collector on; what has been imported so far counts as old, and is not searched at once."""
    gc.freeze()
    gc.unfreeze()
    gc.set_threshold(500_000)
    gc.enable()


def not_shared_out(study: config.Study, instance: Mapping[str, Any]) -> str:
    """Of a stage that has too little to do for several processes."""
    return "it has little to do"


def shared_out(study: config.Study, instance: Mapping[str, Any]) -> str:
    """Of a stage that any number of processes can do together."""
    return ""


@_ends_without_teardown()
def run_script(
    name: str,
    work: Callable[[Stage], None],
    script: str,
    why_alone: Callable[[config.Study, Mapping[str, Any]], str] = not_shared_out,
    **arguments: type,
) -> None:
    """Runs a stage from the command line and ends the process.

    Args:
        work: reads `stage.study` and calls `stage.run`; where the machine has several processes, in each of them.
        script: the caller's `__file__`.
        why_alone: from the study and the instance, why one process must do it; empty if several can.
        arguments: what tells instances apart, with their types: `run=str, seed=int`.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--params", default="params.yaml", type=Path, help="the study (default: params.yaml)")
    for argument, kind in arguments.items():
        parser.add_argument(f"--{argument}", required=True, type=kind)
    given = vars(parser.parse_args())
    path = given.pop("params")
    _collect_garbage()
    _die_with_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    alone = ""
    try:
        study = config.load(path)
        _known(given, study, path)
        if not launching.is_launched():
            lock_file.keep(study.name)
            lock_file.forget_checkpoints(study.name)
            machine = machine_file.settings()
            command = [sys.executable, *sys.argv]
            if machine.launcher == "slurm" and why_alone is not not_shared_out:
                label = "-".join([name, *map(str, given.values())])
                folder, one_node = machine_file.root() / ".slurm" / label, why_alone(study, given) != ""
                sys.exit(cluster.run(machine, command, label=label, folder=folder, one_node=one_node))
            if launching.is_wanted(machine) and not (alone := why_alone(study, given)):
                sys.exit(launching.launch(machine, command))
        work(Stage(name, given, study, path, Path(script), Layout.of(study), alone=alone))
    except StudyError as error:
        _end(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _out_of_memory(error):
            _end(
                f"error: {name}: out of memory ({str(error).splitlines()[0] if str(error) else 'no room'})\n"
                f"  What to do: in {path}, lower batch_size, set attention.source: cache (no teacher in the step), "
                "or set training.precision: bfloat16; or set micro_batch or checkpointing in machine.yaml"
            )
        if not launching.is_launched():
            raise
        _end(traceback.format_exc())


def _end(message: str) -> NoReturn:
    """Ends the process; of several, the launcher prints the message of the one that failed first."""
    if launching.is_launched():
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # with which the launcher ends the others: this one is ending
        launching.leave_word(message)
        sys.exit(1)
    sys.exit(message)


def _out_of_memory(error: Exception) -> bool:
    """Python's own error, or one of torch's, which is not loaded in every stage: GPU and CPU say it differently."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )


def _known(given: dict[str, Any], study: config.Study, path: Path) -> None:
    """The instance that DVC asks for must be one of the study."""
    for argument, names in (("run", study.runs), ("teacher", study.teachers), ("seed", study.seeds)):
        if argument in given and given[argument] not in names:
            raise StudyError(
                f"has no {argument} {given[argument]!r}",
                where=str(path),
                remedy=f"known are {', '.join(map(str, names))}",
            )


def _die_with_parent() -> None:
    """On Linux, a stage ends when the `dvc`, launcher or job that started it is killed: no orphan goes on writing.

    DVC must be its parent, not a shell that DVC started: so commands in dvc.yaml begin with `exec`.
    """
    if sys.platform == "linux" and ("DVC_STAGE" in os.environ or launching.is_launched() or cluster.is_job()):
        import ctypes

        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(1)
