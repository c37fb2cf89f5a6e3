"""A model whose weights, gradients and optimiser state are spread over the processes, by PyTorch's fully_shard (FSDP2).

Every process holds a share of each weight, has the whole weights of one block at a time, and gives its gradients away
as soon as a block's are there. The arithmetic is that of whole weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attention_transfer import processes


def shard(root: nn.Module, blocks: nn.Module, device: torch.device) -> None:
    """Spreads a module's parameters over all processes; each of its blocks is made whole by itself.

    Args:
        root: whose call begins every pass. Until then nobody may have put others in the place of its blocks: that
            call is when PyTorch looks for them.
        blocks: those of a model within `root`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count(),))
    for block in blocks.children():
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)


def whole(value: Any) -> Any:
    """A tensor or a container of them, with all that is spread put together, on the CPU; all processes must call it."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    return value


def spread(values: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict of whole tensors as the model has it: of what is spread there, each process keeps its share."""
    present = model.state_dict()
    return {name: _like(value, present[name]) for name, value in values.items()}


def spread_optimiser(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same of an optimiser's state dict, whose moments are spread as their parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: _like(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in found.items()
        }
        for number, found in state["state"].items()
    }
    return {**state, "state": moments}


def _like(value: Tensor, present: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(present, DTensor):
        return value
    # Every process has read the same file, so that none needs to send anything.
    return distribute_tensor(
        value.to(present.device), present.device_mesh, present.placements, src_data_rank=None
    )
