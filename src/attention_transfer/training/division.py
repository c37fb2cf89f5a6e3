"""How the examples of a step are shared out: among processes, and among the passes of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from attention_transfer import processes
from attention_transfer.errors import StudyError

WHOLE = slice(None)
"""All examples of a step in one pass of one process."""


@dataclass(frozen=True)
class Division:
    """What one process does in a step.

    Attributes:
        batch: examples of the step, of all processes together.
        passes: this process's examples, a stretch of the batch for each forward and backward pass.
        processes: how many work on the step.
    """

    batch: int
    passes: tuple[slice, ...]
    processes: int

    @property
    def is_whole(self) -> bool:
        return self.passes == (WHOLE,)

    def share(self, part: slice) -> float:
        """Of the batch, in a pass: losses are means, so that the step's is the sum of share times loss."""
        return (part.stop - part.start) / self.batch


UNDIVIDED = Division(0, (WHOLE,), 1)


class Pass(NamedTuple):
    """Which examples a pass works on."""

    epoch: int
    step: int
    part: slice

    def following(self, division: Division, *, steps_per_epoch: int) -> Pass:
        """The pass that this process works on next."""
        if self.part != division.passes[-1]:
            return self._replace(part=division.passes[division.passes.index(self.part) + 1])
        epoch, step = divmod(self.epoch * steps_per_epoch + self.step + 1, steps_per_epoch)
        return Pass(epoch, step, division.passes[0])


def divide(
    batch: int,
    *,
    process: int,
    among: int,
    micro_batch: int | None,
    pairs: bool,
    in_step: bool = False,
    where: str,
) -> Division:
    """The passes of one process: as equal as can be, in the order in which one process would see the examples.

    Args:
        batch: examples of a step.
        process, among: number of the process, and how many there are.
        micro_batch: most examples of a pass; None for no limit.
        pairs: whether examples are mixed with their neighbours: the two of a pair stay in one pass.
        in_step: whether all processes must have as many passes.
        where: file and key of the batch size, for error messages.

    Raises:
        StudyError: there are fewer examples, or pairs, than processes; or a pass holds no whole pair; or a process
            would have an empty pass.
    """
    if among == 1 and (micro_batch is None or micro_batch >= batch):
        return UNDIVIDED
    unit, name = (2, "pairs of mixed images") if pairs else (1, "images")
    units = batch // unit
    if units < among:
        raise StudyError(
            f"a step has {units} {name}, too few for {among} processes",
            where=where,
            remedy="set fewer processes in machine.yaml, or a larger batch_size",
        )
    most = units if micro_batch is None else micro_batch // unit
    if most == 0:
        raise StudyError(
            f"micro_batch {micro_batch} holds no pair of mixed images",
            where="machine.yaml: micro_batch",
            remedy="set it to 2 or more",
        )
    own = processes.share_of(units, process, among)
    largest = processes.share_of(units, 0, among) if in_step else own
    count = -(-(largest.stop - largest.start) // most)
    if in_step and count > units // among:
        raise StudyError(
            f"{units} {name} are no whole number for each of {among} processes, whose passes hold one",
            where=where,
            remedy=f"set micro_batch to {2 * unit} or more in machine.yaml, or another batch_size",
        )
    parts = [processes.share_of(own.stop - own.start, number, count) for number in range(count)]
    passes = [slice(unit * (own.start + part.start), unit * (own.start + part.stop)) for part in parts]
    return Division(unit * units, tuple(passes), among)
