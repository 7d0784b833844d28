"""Take the weights out of a checkpoint and write them as safetensors, smaller and without anything else.

    python3 tools/export_weights.py --ckpt results/000-GPT-L/checkpoints/0100000.pt --output gpt-l.safetensors

Every command reads the result like the checkpoint itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from utils import checkpoint
from utils.args import make_parser
from utils.errors import run
from utils.precision import DTYPES


def export_weights(path: str | Path, output: str | Path, dtype: torch.dtype, prefer_ema: bool = True) -> int:
    """Write the weights of any checkpoint to the safetensors file `output`; returns its size in bytes.

    Tensors of floating point are stored as `dtype`, others as they are.

    Raises:
        ValueError: when `output` has another suffix, or a weight is too large for `dtype`.
        CheckpointError: a checkpoint that cannot be read.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"--output must end in .safetensors, by which commands know the format; found {output}")
    weights = checkpoint.state_dict_of(checkpoint.read(path), path, prefer_ema)
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    for key, value in stored.items():
        if value.is_floating_point() and not torch.equal(value.isfinite(), weights[key].isfinite()):
            raise ValueError(f"{key} in {path} has values that {dtype} cannot hold; give another --precision")
    checkpoint.save_weights(stored, output)
    return output.stat().st_size


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--ckpt", required=True, help="checkpoint, in any known format")
    flags.add_argument("--output", required=True, help="the .safetensors file to write")
    flags.add_argument("--precision", choices=list(DTYPES), default="none", help="format of the stored weights")
    flags.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the averaged weights where the checkpoint has them",
    )
    return flags


def main(args: argparse.Namespace) -> None:
    """Write the file and say how large it is."""
    size = export_weights(args.ckpt, args.output, DTYPES[args.precision], args.ema)
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(lambda: main(parser().parse_args()))
