"""What number formats do to a GPT: bits per token of held-out codes, and how often the likeliest code is the same.

    python -m benchmarks.quantization --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 --code-path VAL_CODES

The codes are fed one after another through each engine, as in sampling; the reference is the eager engine in float32.
--kv-cache-dtype also measures it with keys and values in 8 bits. The last line is one JSON object. Class-conditional
models.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from autoregressive.build import add_gpt_args, load_gpt
from autoregressive.engine.build import QUANTIZE, make_engine
from autoregressive.models.cache import EIGHT_BITS, DecodeCache
from autoregressive.models.engine import Engine
from autoregressive.models.gpt import Transformer
from autoregressive.train.inputs import ClassInputs
from autoregressive.train.validation import HeldOut
from utils.args import add_runtime_args, apply_threads, make_parser
from utils.distributed import process_group
from utils.errors import run
from utils.precision import DTYPES


class RoundedCaches(Engine):
    """The plain engine with caches in one of `EIGHT_BITS`: what their rounding does, without kernels that have them."""

    def __init__(self, model: Transformer, kv_cache_dtype: str) -> None:
        super().__init__(model)
        self.kv_cache_dtype = kv_cache_dtype

    def new_cache(
        self, rows: int, positions: int, dtype: torch.dtype, device: torch.device, key_mask: Tensor | None
    ) -> DecodeCache:
        """As `Engine.new_cache`, in this engine's format and not in `dtype`."""
        return super().new_cache(rows, positions, EIGHT_BITS[self.kv_cache_dtype], device, key_mask)


@torch.no_grad()
def fed_logits(engine: Engine, labels: Tensor, codes: Tensor) -> Iterator[Tensor]:
    """For each of the N codes int64 (B, N), one after the other, the logits (B, V) that predict it."""
    cache = engine.new_cache(len(labels), codes.shape[1], engine.tok_embeddings.weight.dtype, labels.device, None)
    position = torch.arange(codes.shape[1], device=labels.device)
    yield engine(None, labels, position[:1], cache=cache, last_only=True)[0][:, -1]
    for i in range(codes.shape[1] - 1):
        yield engine(codes[:, i, None], None, position[i + 1, None], cache=cache)[0][:, -1]


def engines(args: argparse.Namespace, device: torch.device) -> dict[str, Engine]:
    """The reference first, then with each format of caches, then one engine for each precision and quantization."""
    own = {"reference": make_engine(load_gpt(args, args.vocab_size, device), "eager")}
    for name in args.kv_cache_dtype:
        own[f"reference, {name} caches"] = RoundedCaches(own["reference"].model, name)
    for precision in args.precision:
        for quantize in args.quantize:
            model = load_gpt(args, args.vocab_size, device, DTYPES[precision])
            engine = make_engine(model, "auto", quantize)
            own[f"{engine.name} {precision} {quantize}"] = engine
    return own


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Bits per token and agreement with the reference's likeliest code, by engine."""
    own = engines(args, device)
    bits, agreed, tokens = dict.fromkeys(own, 0.0), dict.fromkeys(own, 0), 0
    inputs = ClassInputs(args, device)
    for _, *batch in DataLoader(HeldOut(inputs.codes(args.code_path), args.images), batch_size=args.batch_size):
        fed = inputs(batch)
        codes, labels = fed["targets"], fed["cond_idx"]
        for i, logits in enumerate(zip(*(fed_logits(engine, labels, codes) for engine in own.values()))):
            for name, row in zip(own, logits):
                bits[name] += F.cross_entropy(row, codes[:, i], reduction="sum").item() / math.log(2)
                agreed[name] += int((row.argmax(-1) == logits[0].argmax(-1)).sum())
        tokens += codes.numel()
    return {
        name: {"bits_per_token": round(bits[name] / tokens, 5), "greedy_agreement": round(agreed[name] / tokens, 5)}
        for name in own
    }


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--code-path", required=True, help="codes of held-out images, packed or in files")
    flags.add_argument("--dataset", default="imagenet_code", help="how the codes are stored")
    flags.add_argument("--images", type=int, help="measure so many images, spread evenly; default: all")
    flags.add_argument("--vocab-size", type=int, default=16384, help="codes in the tokenizer's codebook")
    flags.add_argument("--batch-size", type=int, default=16, help="images at a time")
    flags.add_argument("--precision", choices=list(DTYPES), nargs="+", default=["none", "bf16"], help="formats")
    flags.add_argument("--quantize", choices=QUANTIZE, nargs="+", default=list(QUANTIZE), help="of the matrices")
    flags.add_argument(
        "--kv-cache-dtype",
        choices=list(EIGHT_BITS),
        nargs="*",
        default=[],
        help="also measure the reference with keys and values in 8 bits; default: do not",
    )
    add_gpt_args(flags)
    add_runtime_args(flags)
    return flags


def main() -> None:
    """Measure and print a table."""
    args = parser().parse_args()
    apply_threads(args)
    with process_group(args.device) as device:
        found = measure(args, device)
    for name, of in found.items():
        print(f"{name:23} {of['bits_per_token']:.5f} bits per token, same greedy code {of['greedy_agreement']:.2%}")
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)
