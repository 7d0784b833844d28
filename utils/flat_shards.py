"""Optimizer states of the established sharded trainer (FSDP1): one file for each process.

``optimizer.{rank:05d}-of-{world:05d}.pth`` beside ``consolidated.pth`` holds that process's AdamW state, where each
moment is a slice of the flattened parameter; a parameter of which a process holds nothing has no entry. The slices of
all processes, one after the other, are the parameter, so any number of processes can go on from them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAME = re.compile(r"optimizer\.(\d+)-of-(\d+)\.pth")


def shard_files(folder: Path) -> list[Path]:
    """The files of all processes, in order of rank; empty when there are none.

    Raises:
        ValueError: when some of them are missing.
    """
    found = sorted(path for path in folder.glob("optimizer.*.pth") if _NAME.fullmatch(path.name))
    if found:
        world = int(_NAME.fullmatch(found[0].name)[2])  # type: ignore[index]
        if len(found) != world:
            raise ValueError(f"{folder} holds the optimizer states of {len(found)} of {world} processes; copy them all")
    return found


def joined(shards: Sequence[dict[str, Any]], shapes: Sequence[torch.Size], source: Path) -> dict[str, Any]:
    """One optimizer state with whole moments, of parameters with `shapes`, from those of all processes.

    Raises:
        ValueError: when the slices do not make up the parameters.
    """
    state = {}
    for index, shape in enumerate(shapes):
        slices = [shard["state"][index] for shard in shards if index in shard["state"]]
        if slices:
            names = [name for name in slices[0] if name != "step"]
            whole = {name: _join([part[name] for part in slices], shape, source) for name in names}
            state[index] = {"step": slices[0]["step"], **whole}
    return {"state": state, "param_groups": shards[0]["param_groups"]}


def _join(slices: list[Tensor], shape: torch.Size, source: Path) -> Tensor:
    flat, size = torch.cat([part.flatten() for part in slices]), shape.numel()
    if flat.numel() < size or flat.numel() % size:  # with hybrid sharding each group of processes holds a copy
        raise ValueError(
            f"the optimizer states in {source} are of another model: found {flat.numel()} values for a parameter of "
            f"shape {tuple(shape)}"
        )
    return flat[:size].view(shape)
