"""A GPT whose training does not fit one device, over several: each process keeps some rows of every weight, of its
gradient and of its optimiser state, by PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv 2304.11277).

A block's weights are gathered when it computes and dropped after it. Gradients are added up over the processes and kept
in parts. So the loss is that of one process, and so are the checkpoints: `runs.tensors` gathers one tensor at a time.
AdamW and the n-gram tables' RMSprop work on the parts as they are. Muon needs whole matrices, see `one_by_one`.

Each process must call the core equally often, because a call gathers weights from all. Previews and the shared
validation do not, so there are no previews, and every process scores the whole validation split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfcli import cores
from dfcli.system.device import Device
from dfcli.system.processes import ALONE, Processes, whole


def shard(core: cores.Core, group: Processes, device: Device) -> None:
    """Spread the weights of `core`, the same in each process and on the CPU, over the devices of the group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    assert isinstance(core, cores.GPT)
    mesh = init_device_mesh(device.kind, (group.count,))
    for block in core.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(core, mesh=mesh, reshard_after_forward=True)  # else an evaluation leaves the tables whole
    for module in core.modules():
        if isinstance(module, FSDPModule):
            # Each process's gradients are of the mean over the targets of all, so their sum is the gradient.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide
    group.sharded = True


def is_sharded(core: nn.Module) -> bool:
    """Whether each process holds a part of the core's weights."""
    return any(hasattr(p, "full_tensor") for p in core.parameters())


def scoring(core: nn.Module, group: Processes) -> Processes:
    """The processes that share an evaluation of `core`: each of them scores everything where weights are sharded."""
    return ALONE if is_sharded(core) else group


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as the rows of the sharded tensor `like`; whole where that is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    of: Any = like
    return distribute_tensor(tensor, of.device_mesh, of.placements, src_data_rank=None)


@torch.no_grad()
def one_by_one(work: Callable[[list[Tensor]], list[Tensor]], matrices: list[Tensor]) -> list[Tensor]:
    """`work` on matrices of which each process holds some rows: it needs them whole, so one after another is gathered.
    Every process computes all: for Muon that is little beside a step of many tokens."""
    return [part(work([whole(matrix)])[0], matrix) for matrix in matrices]
