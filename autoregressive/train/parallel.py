"""How a GPT is spread over processes: activation checkpointing, then torch.compile, then DDP or FSDP2, in this order.

The model knows nothing of this: its blocks get another `forward`, and FSDP2 replaces its parameters by shards, so names
and shapes in its state dict stay what they are.

    ddp     every process holds everything, gradients are averaged
    sdp     gradients and optimizer states are sharded; weights too, but they stay whole from forward to backward
    fsdp    weights are gathered block by block, in forward and again in backward, and never stay whole
    hsdp    fsdp within groups of --shard-size processes (one machine), whose gradients are averaged over the groups
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from autoregressive.models.gpt import Transformer
from utils.distributed import data_parallel, get_world_size, is_main, read_launch
from utils.ema import requires_grad
from utils.precision import DTYPES, FULL_PRECISION
from utils.sharded import fill_from_main

STRATEGIES = ("ddp", "sdp", "fsdp", "hsdp")
REMEMBERED = ("none", "selective", "full")
_KEPT = (  # what selective checkpointing does not compute twice: matrix products and attention
    "mm",
    "addmm",
    "bmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def add_parallel_args(parser: argparse.ArgumentParser, default: str = "ddp") -> None:
    """How the work is spread, and what is given up in time to save memory."""
    group = parser.add_argument_group("parallelism")
    group.add_argument(
        "--data-parallel",
        choices=STRATEGIES,
        default=default,
        help="ddp: whole model in every process; fsdp: weights, gradients and optimizer states sharded; "
        "sdp: fsdp whose gathered weights stay until the backward pass; hsdp: fsdp within a machine, copies across",
    )
    group.add_argument(
        "--shard-size", type=int, help="hsdp: processes that share one copy; default: those of a machine"
    )
    group.add_argument(
        "--grad-precision",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="number format in which sharded gradients are summed over processes",
    )
    group.add_argument(
        "--residual-dtype",
        choices=["fp32", "compute"],
        help="number format of what the blocks hand to each other: float32, or that of --mixed-precision, which takes "
        "less memory and time; default: fp32 with ddp, compute otherwise (the only way there)",
    )
    group.add_argument(
        "--activation-checkpointing",
        choices=REMEMBERED,
        default="none",
        help="selective: keep the results of matrix products and attention, compute the rest again; "
        "full: keep the input of each block alone",
    )
    group.add_argument(
        "--consolidated",
        choices=["always", "last", "never"],
        default="always",
        help="sharded checkpoints: which of them hold the whole weights (consolidated.pth) too",
    )


class Placed(NamedTuple):
    """A model on its devices: its weights, what to call in training, and the average of the weights if wanted."""

    model: Transformer
    wrapped: nn.Module
    ema: Transformer | None


def parallelize(make: Callable[[], Transformer], args: argparse.Namespace, device: torch.device) -> Placed:
    """Build, place and wrap the model of `make`; with equal seeds the weights are equal whatever the strategy.

    With a sharded strategy only rank 0 ever holds the whole model, in main memory.

    Raises:
        ValueError: when the settings contradict each other.
    """
    if args.residual_dtype == "fp32" and args.data_parallel != "ddp":
        raise ValueError("--residual-dtype fp32 needs --data-parallel ddp: sharded weights are all of the short format")
    whole = make() if args.data_parallel == "ddp" or is_main() else None
    if args.data_parallel == "ddp":
        model = whole.to(device)  # type: ignore[union-attr]
        ema = copy.deepcopy(model) if args.ema else None
    else:
        with torch.device("meta"):
            model, ema = make(), make() if args.ema else None
    if ema is not None:
        requires_grad(ema.eval(), False)

    if args.residual_dtype == "compute" and args.data_parallel == "ddp":
        model.layers[0].register_forward_pre_hook(_in_autocast_dtype)
    if args.activation_checkpointing != "none":
        _checkpoint_blocks(model, args.activation_checkpointing)
    if args.compile if args.compile is not None else device.type == "cuda":
        _compile_blocks(model)
    if args.data_parallel == "ddp":
        return Placed(model, data_parallel(model, device), ema)
    mesh = _mesh(args, device)
    for part in filter(None, (model, ema)):
        _shard(part, args, mesh)
        part.to_empty(device=device)
        fill_from_main(part, whole)
    return Placed(model, model, ema)


def _in_autocast_dtype(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first block's inputs with the embedding in autocast's format: those of all later blocks follow from it."""
    h, *rest = inputs
    kind = h.device.type
    return (h.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else h, *rest)


def _checkpoint_blocks(model: Transformer, mode: str) -> None:
    """Let each block compute its activations again in the backward pass instead of keeping them."""
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matrix_products)
    for block in model.get_fsdp_wrap_module_list():
        block.forward = _recomputed(block.forward, options)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        return checkpoint(forward, *inputs, **named, **options)

    return run


def _keep_matrix_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op.namespace == "aten" and op.name().split("::")[1].split(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _compile_blocks(model: Transformer) -> None:
    """One compilation for all blocks, which are alike."""
    for block in model.get_fsdp_wrap_module_list():
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def _mesh(args: argparse.Namespace, device: torch.device) -> DeviceMesh:
    world = get_world_size()
    if args.data_parallel != "hsdp":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    size = args.shard_size or read_launch().local_size
    if size < 1 or world % size:
        raise ValueError(f"--shard-size {size} does not divide the {world} processes into equal groups")
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def _shard(model: Transformer, args: argparse.Namespace, mesh: DeviceMesh) -> None:
    """One FSDP unit for each block, and one for the rest."""
    policy = MixedPrecisionPolicy(
        param_dtype=None if args.mixed_precision in FULL_PRECISION else DTYPES[args.mixed_precision],
        reduce_dtype=torch.float32 if args.grad_precision == "fp32" else DTYPES[args.grad_precision],
        cast_forward_inputs=False,  # the rotary table stays float32; autocast takes care of the rest
    )
    options = {"mesh": mesh, "mp_policy": policy}
    for block in model.get_fsdp_wrap_module_list():
        fully_shard(block, reshard_after_forward=args.data_parallel != "sdp", **options)
    fully_shard(model, reshard_after_forward=False, **options)


@contextlib.contextmanager
def gradient_sync(wrapped: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether a backward pass inside the block sums gradients over the processes; the last of a step has to."""
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(wanted)
    with wrapped.no_sync() if not wanted and hasattr(wrapped, "no_sync") else contextlib.nullcontext():
        yield
