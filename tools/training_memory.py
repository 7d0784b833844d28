"""What fits on the GPUs at hand: memory of training each GPT size, by arithmetic.

    python3 tools/training_memory.py --image-size 256 --gpus 8 --gpu-memory 80

Prints a table: bytes per GPU of weights, gradients and optimizer; of the activations of one image; and how many images
a micro-batch may have. Activations are counted by running the model on tensors without data and noting what autograd
keeps, in eager mode; with --compile they are what compiled blocks keep, a third less (utils/memory.py).
docs/training.md says what is counted.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from autoregressive.build import latent_grid
from autoregressive.models.config import SIZES, ModelArgs, sized_args
from autoregressive.models.gpt import Transformer
from utils.args import make_parser
from utils.errors import run
from utils.memory import Weights, compiled_block_bytes, images_that_fit, state_bytes

RESERVED = 6e9  # bytes left to CUDA's context, NCCL's buffers and fragmentation
_ROWS = [("ddp", "none"), ("fsdp", "none"), ("fsdp", "full")]  # strategy, activation checkpointing


def weights_of(config: ModelArgs) -> Weights:
    """How many parameters a model has, and where."""
    with torch.device("meta"):
        model = Transformer(config)
    block = sum(p.numel() for p in model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    return Weights(config.n_layer, block, total - config.n_layer * block)


def saved_bytes(config: ModelArgs, images: int, sharded: bool) -> int:
    """Bytes that autograd keeps of one forward pass in bfloat16, beside the weights; nothing is computed.

    With DDP weights are float32 under autocast, with FSDP2 (`sharded`) they are bfloat16 already, and so is the
    stream between the blocks.
    """
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}
    usual = torch.get_default_dtype()
    try:
        with FakeTensorMode():
            torch.set_default_dtype(torch.bfloat16 if sharded else torch.float32)
            model = Transformer(config).train()
            own = {p.untyped_storage()._cdata for p in model.parameters()}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage, storage.nbytes()  # held, so that no other one gets its address
                return tensor

            codes = torch.zeros(images, config.block_size, dtype=torch.int64)
            condition = torch.zeros(images, dtype=torch.int64)
            if config.model_type == "t2i":
                condition = torch.zeros(images, config.cls_token_num, config.caption_dim)
            with saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
                model(codes[:, :-1], condition, targets=codes, loss_only=True)
    finally:
        torch.set_default_dtype(usual)
    return sum(size for _, size in kept.values())


def activation_bytes(config: ModelArgs, sharded: bool, checkpointing: str = "none", compiled: bool = False) -> int:
    """Bytes that one image adds to a micro-batch at the peak, which is the beginning of the backward pass.

    `checkpointing` is "none", "full" (the input of each block is kept, and one block at a time is computed again) or,
    `compiled` alone, "selective".

    Raises:
        ValueError: for another `checkpointing`.
    """
    if checkpointing == "selective" and not compiled:
        raise ValueError("what selective checkpointing keeps is known of compiled blocks alone")
    one, two = (_bytes_per_image(sharded, **{**vars(config), "n_layer": layers}) for layers in (1, 2))
    eager = two - one
    positions, stream = config.cls_token_num + config.block_size - 1, 2 if sharded else 4

    def block(mode: str) -> int:
        if compiled:
            return positions * compiled_block_bytes(config, mode, stream)
        return eager if mode == "none" else positions * config.dim * stream

    again = block("none") if checkpointing == "full" else 0
    return one - eager + config.n_layer * block(checkpointing) + again


@functools.lru_cache
def _bytes_per_image(sharded: bool, **fields: Any) -> int:
    config = ModelArgs(**fields)
    return saved_bytes(config, 2, sharded) - saved_bytes(config, 1, sharded)


def table(sizes: list[str], args: argparse.Namespace) -> list[str]:
    """The lines of a Markdown table, one for each of `sizes`."""
    heads = ["model", "parameters"]
    heads += [f"{strategy}, checkpointing {mode}: state + per image, images that fit" for strategy, mode in _ROWS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    fields = {"block_size": latent_grid(args) ** 2, "model_type": args.gpt_type}
    fields["cls_token_num"] = 1 if args.gpt_type == "c2i" else 120
    for size in sizes:
        config = sized_args(size, **fields)
        weights = weights_of(config)
        cells = [size, f"{weights.total / 1e6:,.0f}M"]
        for strategy, mode in _ROWS:
            state = state_bytes(weights, strategy, args.gpus, args.ema)
            image = activation_bytes(config, strategy != "ddp", mode, args.compile)
            fit = images_that_fit(args.gpu_memory * 1e9 - RESERVED, state, image)
            cells.append(f"{state / 1e9:.1f} + {image / 1e9:.2f} GB, {fit or 'does not fit'}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--gpt-models", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes to show")
    flags.add_argument("--gpt-type", choices=["c2i", "t2i"], default="c2i", help="condition: class or text")
    flags.add_argument("--image-size", type=int, default=256, help="edge of the images in pixels")
    flags.add_argument("--downsample-size", type=int, default=16, help="pixels per code along an edge")
    flags.add_argument("--gpus", type=int, default=8, help="GPUs that share one copy (all, or those of a machine)")
    flags.add_argument("--gpu-memory", type=float, default=80, help="gigabytes of one GPU")
    flags.add_argument("--ema", action="store_true", help="with averaged weights")
    flags.add_argument("--compile", action="store_true", help="with torch.compile, which training uses on GPUs")
    return flags


def main() -> None:
    """Print the table."""
    args = parser().parse_args()
    print("\n".join(table(args.gpt_models, args)))


if __name__ == "__main__":
    run(main)
