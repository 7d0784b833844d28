"""Tensors in pieces: between whole tensors and the shards of FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.distributed import broadcast


def like_sharded(value: Tensor, target: Tensor) -> Tensor:
    """`value`, whole and equal on all processes, cut as `target` is; as it is when either makes no cut necessary."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def whole(value: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process (they all have to call this); others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This process's shard, sharing memory with `value`; a tensor that is not sharded as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def fill_from_main(model: nn.Module, source: nn.Module | None) -> None:
    """Copy all weights and buffers of rank 0's `source` (None on the others) into the sharded `model`."""
    given = source.state_dict() if source is not None else {}
    for name, target in model.state_dict().items():
        here = {"dtype": target.dtype, "device": target.device}
        value = given[name].to(**here) if given else torch.empty(target.shape, **here)
        broadcast(value)
        target.copy_(like_sharded(value, target))
