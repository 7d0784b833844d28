"""Processes: one on a laptop, several under torchrun or Slurm, on CPU (gloo) or GPU (nccl).

Every helper works without a process group too, where it answers for a world of one process. Commands open their work
with ``with process_group() as device:`` and never ask how they were started.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Launch:
    """Who this process is: `rank` of `world_size`, and `local_rank` of `local_size` on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "alone"


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's variables, else Slurm's (only inside a multi-task job step), else: a process on its own."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local_rank = int(environ.get("LOCAL_RANK", rank % max(torch.cuda.device_count(), 1)))
        return Launch(rank, world, local_rank, int(environ.get("LOCAL_WORLD_SIZE", 1)), "torchrun")
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return Launch(
            int(environ["SLURM_PROCID"]),
            int(environ["SLURM_NTASKS"]),
            int(environ.get("SLURM_LOCALID", 0)),
            int(re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0]),  # such as "4(x2)"
            "slurm",
        )
    return Launch()


@contextlib.contextmanager
def process_group(device: str | None = None, even_alone: bool = False) -> Iterator[torch.device]:
    """Start the process group this launch calls for, yield the device to work on, and close the group.

    `device` ("cuda" or "cpu") overrides the choice: a GPU when there is one, else the CPU. A process on its own gets a
    group if `even_alone`, for code that shards. Inside another such block the group that is there is used, so that a
    command can be made of several recipes.
    """
    launch = read_launch()
    chosen = _choose_device(launch, device)
    if dist.is_initialized():
        yield chosen
        return
    if launch.world_size > 1:
        _start_group(launch, chosen)
    elif even_alone:
        dist.init_process_group(_backend(chosen), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield chosen
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _choose_device(launch: Launch, device: str | None) -> torch.device:
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.split(":")[0] != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise ValueError(
            "device 'cuda' was asked for, but torch sees no GPU here; leave the flag out to run on the CPU"
        )
    if launch.world_size == 1:
        chosen = torch.device(kind)
        if chosen.index is not None:
            torch.cuda.set_device(chosen)  # kernels and graphs of our own start on the current one
        return chosen
    if launch.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {launch.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            f"start at most that many processes per machine"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def _start_group(launch: Launch, device: torch.device) -> None:
    if launch.launcher == "slurm":
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host(os.environ["SLURM_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(
        backend=_backend(device),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=30),
        device_id=device if device.type == "cuda" else None,
    )


def _backend(device: torch.device) -> str:
    """On GPUs gloo as well: checkpoints in the background are agreed upon by the CPUs."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _first_slurm_host(node_list: str) -> str:
    command = ["scontrol", "show", "hostnames", node_list]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def get_rank() -> int:
    """This process's rank; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """How many processes work together; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Element-wise mean of a tensor over all processes (the same tensor when alone)."""
    if get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / get_world_size()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum of a tensor over all processes (the same tensor when alone)."""
    if get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any process; every process gets the same answer."""
    if get_world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor([float(flag)], device=device)).item())


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every process."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def group_device() -> torch.device:
    """The device whose tensors this process exchanges with the others: its GPU under nccl, else the CPU."""
    if dist.is_initialized() and has_nccl(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def has_nccl(backend: str) -> bool:
    """Whether `backend`, as torch names that of a group ("nccl", "gloo", "cpu:gloo,cuda:nccl"), exchanges over nccl."""
    return any(part.split(":")[-1] == "nccl" for part in backend.lower().split(","))


def gather_objects(value: Any) -> list[Any]:
    """Every process's `value`, in rank order, on every process."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (N_r, ...) of all processes below one another in rank order, on every process; N_r may differ."""
    if get_world_size() == 1:
        return rows
    counts = gather_objects(len(rows))
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def group_store() -> dist.Store:
    """The key-value store through which the group's processes found each other; it has atomic counters."""
    return dist.distributed_c10d._get_default_store()


def broadcast(tensor: Tensor) -> None:
    """Overwrite `tensor` in place with rank 0's values."""
    if get_world_size() > 1:
        dist.broadcast(tensor.detach(), src=0)


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap in DDP when there are several processes. Buffers stay each rank's own.

    The only buffers here that change are the codebook-usage window and batch-norm statistics; broadcasting them on
    every forward would replace what the other ranks saw by what rank 0 saw.
    """
    if get_world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    ids = [device.index] if device.type == "cuda" else None
    # gradients live in the buckets that are summed, not beside them: four bytes per parameter less
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over all processes, for modules that are not wrapped in DDP."""
    if get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def init_distributed_mode(args: Any) -> None:
    """The established entry: start the group and set rank, world_size, gpu, distributed, dist_url, dist_backend."""
    launch = read_launch()
    device = _choose_device(launch, None)
    args.rank, args.world_size, args.gpu = launch.rank, launch.world_size, launch.local_rank
    args.distributed = launch.world_size > 1
    args.dist_url, args.dist_backend = "env://", "nccl" if device.type == "cuda" else "gloo"
    os.environ["LOCAL_SIZE"] = str(launch.local_size)
    if args.distributed:
        _start_group(launch, device)
        dist.barrier()
    else:
        print("Not using distributed mode")
    setup_for_distributed(is_main())


def setup_for_distributed(is_master: bool) -> None:
    """Silence `print` on other ranks, as established scripts expect; ``print(..., force=True)`` prints anywhere."""
    plain_print = getattr(builtins.print, "plain_print", builtins.print)

    def print_on_master(*values: Any, force: bool = False, **kwargs: Any) -> None:
        if is_master or force:
            plain_print(*values, **kwargs)

    print_on_master.plain_print = plain_print  # type: ignore[attr-defined]
    builtins.print = print_on_master
