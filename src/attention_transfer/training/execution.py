"""How training runs on this machine: passes, compiled code, activations kept or computed again.

None of it changes what is computed, but for rounding. What was asked for and cannot be is left out for a reason that
the record tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from attention_transfer import processes
from attention_transfer.machine_file import Machine
from attention_transfer.training.division import UNDIVIDED, Division, divide


@dataclass(frozen=True)
class Execution:
    """One training's.

    Attributes:
        division: what of each batch this process works on, in how many passes.
        compiled: the model as one, its blocks one by one, or nothing.
        checkpointing: whether the activations within blocks are computed again for the backward pass.
        sharded: whether the model's weights are spread over the processes.
        left_out: what machine.yaml asks for and this training cannot have, with the reason.
    """

    division: Division = UNDIVIDED
    compiled: Literal["no", "model", "blocks"] = "no"
    checkpointing: bool = False
    sharded: bool = False
    left_out: tuple[tuple[str, str], ...] = ()

    def apply(self, model: Any) -> None:
        """Makes a timm model run so; its weights and their names stay as they are."""
        if self.checkpointing:
            model.set_grad_checkpointing(True)
        parts: dict[str, list[nn.Module]] = {"no": [], "model": [model], "blocks": list(model.blocks)}
        if self.compiled != "no":
            torch._inductor.config.fallback_random = True  # the eager model's numbers
            # Stochastic depth has another graph in every pass; beside those, training and prediction have a few.
            torch._dynamo.config.recompile_limit = 8 + 2 * len(self.division.passes)
        for part in parts[self.compiled]:
            part.compile(dynamic=False)

    def paths(self, device: torch.device) -> dict[str, str]:
        """For the stage's record: nothing where all is as without machine.yaml."""
        found = dict(self.left_out)
        if self.division.processes > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            found["processes"] = f"{self.division.processes} by {backend}"
        if len(self.division.passes) > 1:
            sizes = [part.stop - part.start for part in self.division.passes]
            found["passes"] = f"{len(sizes)} of up to {max(sizes)} images"
        if self.compiled != "no":
            found["compile"] = self.compiled
        if self.checkpointing:
            found["checkpointing"] = "blocks"
        if self.sharded:
            found["sharding"] = "fsdp"
        return found


def choose(
    machine: Machine,
    *,
    batch: int,
    pairs: bool,
    called: Literal["whole", "in parts"],
    indivisible: str = "",
    shardable: bool = False,
    where: str,
) -> Execution:
    """What this process does of a training, by machine.yaml and by what the training can.

    Args:
        batch: examples of a step.
        pairs: whether examples are mixed with their neighbours.
        called: whether the model's own forward is called, or parts of it.
        indivisible: why a step must be one pass, if it must.
        shardable: whether its weights may be spread over the processes.
        where: file and key of the training's params, for error messages.

    Raises:
        StudyError: see `division.divide`.
    """
    left_out: list[tuple[str, str]] = []
    sharded = shardable and machine.sharding == "fsdp" and processes.count() > 1
    if machine.sharding == "fsdp" and not sharded:
        left_out.append(("sharding", "no: one process" if shardable else "no: not a student"))
    division = UNDIVIDED
    if indivisible:
        if machine.micro_batch is not None:
            left_out.append(("passes", f"one: {indivisible}"))
    else:
        division = divide(
            batch,
            process=processes.number(),
            among=processes.count(),
            micro_batch=machine.micro_batch,
            pairs=pairs,
            in_step=sharded,  # every pass gathers weights from all of them
            where=f"{where}.batch_size",
        )
    compiled: Literal["no", "model", "blocks"] = "no"
    if machine.compile and sharded:
        left_out.append(("compile", "no: the weights are spread over the processes"))
    elif machine.compile:
        compiled = "model" if called == "whole" else "blocks"
    return Execution(division, compiled, machine.checkpointing, sharded, tuple(left_out))
