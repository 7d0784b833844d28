"""What number formats do to a GPT: bits per token of held-out codes, and how often the likeliest code is the same.

    python -m benchmarks.quantization --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 --code-path VAL_CODES
    python -m benchmarks.quantization --gpt-type t2i ... --code-path VAL_CODES --t5-feat-path FEATURES

The codes are fed one after another through each engine, as in sampling; the reference is the eager engine in float32.
--kv-cache-dtype also measures the reference and, for int8, the native engines with keys and values in 8 bits. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from autoregressive.build import add_gpt_args, load_gpt
from autoregressive.engine.build import QUANTIZE, make_engine
from autoregressive.engine.native import NativeEngine
from autoregressive.models.cache import EIGHT_BITS, DecodeCache
from autoregressive.models.engine import Engine
from autoregressive.models.gpt import Transformer
from autoregressive.train.inputs import Inputs, make_inputs
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
def fed_logits(engine: Engine, cond: Tensor, codes: Tensor, text: Tensor | None = None) -> Iterator[Tensor]:
    """For each of the N codes int64 (B, N), one after the other, the logits (B, V) that predict it.

    `cond` are labels int64 (B,), or caption features (B, P, caption_dim) with `text` bool (B, P), False on padding.
    """
    dtype, prefix, fed = engine.tok_embeddings.weight.dtype, engine.cls_token_num, codes.shape[1] - 1
    mask = None if text is None else torch.cat([text, text.new_ones(len(text), fed)], dim=1)
    cache = engine.new_cache(len(cond), prefix + fed, dtype, cond.device, mask)
    position = torch.arange(prefix + fed, device=cond.device)
    cond = cond.to(dtype) if cond.is_floating_point() else cond
    yield engine(None, cond, position[:prefix], cache=cache, last_only=True)[0][:, -1]
    for i in range(fed):
        yield engine(codes[:, i, None], None, position[prefix + i, None], cache=cache)[0][:, -1]


def condition_and_codes(inputs: Inputs, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `fed_logits` takes of a batch of held-out samples, without those that cannot be read."""
    fed = inputs(batch)
    if "valid" not in fed:
        return fed["cond_idx"], fed["targets"], None
    valid, text = fed["valid"].bool(), batch[2].to(fed["valid"].device)
    return fed["cond_idx"][valid], fed["targets"][valid], text[valid]


def engines(args: argparse.Namespace, device: torch.device) -> dict[str, Engine]:
    """The reference first, then with each format of caches; then one engine for each precision and quantization, native
    ones with int8 caches too."""
    own = {"reference": make_engine(load_gpt(args, args.vocab_size, device), "eager")}
    for name in args.kv_cache_dtype:
        own[f"reference, {name} caches"] = RoundedCaches(own["reference"].model, name)
    for precision in args.precision:
        for quantize in args.quantize:
            model = load_gpt(args, args.vocab_size, device, DTYPES[precision])
            engine = make_engine(model, "auto", quantize)
            own[f"{engine.name} {precision} {quantize}"] = engine
            if "int8" in args.kv_cache_dtype and isinstance(engine, NativeEngine):
                cached = NativeEngine(model, quantize, kv_cache_dtype="int8")
                own[f"native {precision} {quantize}, int8 caches"] = cached
    return own


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Bits per token and agreement with the reference's likeliest code, by engine."""
    own = engines(args, device)
    bits, agreed, tokens = dict.fromkeys(own, 0.0), dict.fromkeys(own, 0), 0
    inputs = make_inputs(args, device)
    for _, *batch in DataLoader(HeldOut(inputs.codes(args.code_path), args.images), batch_size=args.batch_size):
        cond, codes, text = condition_and_codes(inputs, batch)
        for i, logits in enumerate(zip(*(fed_logits(engine, cond, codes, text) for engine in own.values()))):
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
    flags.add_argument("--dataset", default="imagenet_code", help="how the codes of --gpt-type c2i are stored")
    flags.add_argument("--t5-feat-path", help="their text features, for --gpt-type t2i")
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
        help="also measure the reference, and for int8 native engines, with keys and values in 8 bits; default: none",
    )
    add_gpt_args(flags)
    add_runtime_args(flags)
    return flags


def main() -> None:
    """Measure and print a table."""
    args = parser().parse_args()
    if args.gpt_type == "t2i":
        args.dataset = "t2i_code"
    apply_threads(args)
    with process_group(args.device) as device:
        found = measure(args, device)
    for name, of in found.items():
        print(f"{name:30} {of['bits_per_token']:.5f} bits per token, same greedy code {of['greedy_agreement']:.2%}")
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)
