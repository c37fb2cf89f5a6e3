"""Where a stage runs, and how: machine.yaml, which git does not track, and the environment, which wins.

Nothing of it is in params.yaml or in a stage's command, because nothing of it changes what is computed, but for
rounding. docs/scale.md explains the values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from attention_transfer.errors import StudyError

FILE = "machine.yaml"
PREFIX = "ATTENTION_TRANSFER_"
PROCESS = f"{PREFIX}PROCESS"
"""Set for the processes that the launcher has started: they work, and launch nothing."""


@dataclass(frozen=True)
class Machine:
    """What machine.yaml says, or the environment.

    Attributes:
        device: cpu, cuda, mps; None for a GPU if there is one, else the CPU.
        threads: of each process; None for PyTorch's own choice, divided among the processes.
        processes: on a stage; with GPUs one for each. Of a job on several nodes, on each node.
        launcher: `local`: here; `slurm`: as a job of the cluster.
        slurm: what the job asks for, in submitit's words: slurm_partition, timeout_min ..
        micro_batch: images in a pass of one process; a step takes as many passes as it needs. None: all at once.
        compile: whether torch.compile makes the student's code.
        checkpointing: whether the backward pass computes activations again instead of keeping them.
        sharding: `fsdp`: each process holds a share of the student's weights and of what belongs to them.
    """

    device: str | None = None
    threads: int | None = None
    processes: int = 1
    launcher: Literal["local", "slurm"] = "local"
    slurm: Mapping[str, Any] = field(default_factory=dict)
    micro_batch: int | None = None
    compile: bool = False
    checkpointing: bool = False
    sharding: Literal["none", "fsdp"] = "none"

    def choices(self) -> dict[str, Any]:
        """What differs from the defaults, for a stage's record."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Machine(), name)}


_KINDS = get_type_hints(Machine)


def root() -> Path:
    """Of the repository, also where DVC works in a copy of it."""
    return Path(os.environ.get("DVC_ROOT", "."))


def path() -> Path:
    """Of machine.yaml."""
    return root() / FILE


def where(name: str) -> str:
    """Where a value is set, for error messages."""
    variable = PREFIX + name.upper()
    in_file = name in _from_file(path()) and not os.environ.get(variable)
    return f"{path()}: {name}" if in_file else f"environment variable {variable}"


def settings() -> Machine:
    """The values of the environment, else those of machine.yaml, else the defaults.

    Raises:
        StudyError: a key or a value is none of those that there are.
    """
    values = _from_file(path())
    for name in _KINDS:
        variable = PREFIX + name.upper()
        if name != "slurm" and (text := os.environ.get(variable)):
            values[name] = _checked(name, text, where=f"environment variable {variable}")
    return Machine(**values)


def _from_file(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(
            f"cannot be read: {' '.join(str(error).split())}", where=str(file), remedy="correct or remove it"
        ) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise StudyError(
            "holds no keys", where=str(file), remedy="write `key: value` lines; docs/scale.md has an example"
        )
    if unknown := [key for key in found if key not in _KINDS]:
        raise StudyError(
            f"{unknown[0]!r} is no key of this file",
            where=str(file),
            remedy=f"choose among {', '.join(_KINDS)}",
        )
    return {
        name: _checked(name, value, where=f"{file}: {name}")
        for name, value in found.items()
        if value is not None
    }


def _checked(name: str, value: Any, *, where: str) -> Any:
    """The value in its type; words of the environment are read as such."""
    kind = _KINDS[name]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise StudyError(
                f"{value!r} is no {name}", where=where, remedy=f"choose among {', '.join(get_args(kind))}"
            )
        return value
    if name == "slurm":
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise StudyError(
                f"{value!r} are no keys and values", where=where, remedy="write one `key: value` a line"
            )
        return value
    if kind is bool:
        found = {"true": True, "false": False}.get(str(value).lower())
        if found is None:
            raise StudyError(
                f"{value!r} is neither true nor false", where=where, remedy="set it to one of them"
            )
        return found
    if name == "device":
        return str(value)
    text = value if isinstance(value, str) else str(value) if type(value) is int else ""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise StudyError(
            f"{value!r} is not a number of {_COUNTED[name]}",
            where=where,
            remedy="set it to 1 or more, or remove it",
        )
    return int(text)


_COUNTED = {
    "threads": "threads",
    "processes": "processes",
    "micro_batch": "images in a pass",
}
