"""Draw pictures of classes with a trained GPT and tokenizer.

    python3 autoregressive/sample/sample_c2i.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt \
        --image-size 384 --class-labels 207 360 88

Image number i depends on the checkpoint, the settings, --seed and i alone.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tqdm import tqdm

from autoregressive.build import add_gpt_args, load_gpt
from autoregressive.sample.pipeline import add_sampling_args, decode_codes, sample_codes
from tokenizer.build import add_vq_args, load_tokenizer
from utils.args import add_runtime_args, add_seed_arg, apply_threads, make_parser
from utils.distributed import process_group
from utils.errors import run
from utils.files import read_json
from utils.image import make_grid_image, save_png
from utils.precision import DTYPES, allow_tf32
from utils.progress import progress

# golden retriever, otter, red panda, geyser, macaw, valley, balloon, arctic fox
IMAGENET_LABELS = ["207", "360", "387", "974", "88", "979", "417", "279"]


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    what = flags.add_argument_group("pictures")
    what.add_argument("--class-labels", nargs="+", default=IMAGENET_LABELS, help="class ids, or names of --class-names")
    what.add_argument("--class-names", help="JSON list of class names, in the order of their ids")
    what.add_argument("--images-per-class", type=int, default=1, help="pictures of each class")
    what.add_argument("--batch-size", type=int, default=32, help="pictures drawn at once")
    what.add_argument("--columns", type=int, default=4, help="pictures in a row of the grid")
    what.add_argument("--output", help="the grid's file; the default is sample_{gpt-type}.png")
    add_gpt_args(flags, image_size=384)
    flags.add_argument(
        "--from-fsdp", action="store_true", help="accepted for old command lines: formats are recognised"
    )
    flags.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    flags.add_argument("--compile", action="store_true", help="torch.compile the GPT")
    add_vq_args(flags)
    add_sampling_args(flags)
    add_runtime_args(flags)
    add_seed_arg(flags, "--seed")
    flags.add_argument(
        "--legacy-rng", action="store_true", help="draw from the global generator, as upstream's seeds do"
    )
    return flags


def class_ids(args: argparse.Namespace) -> list[int]:
    """The ids that --class-labels names, each repeated --images-per-class times.

    Raises:
        ValueError: an unknown name, or an id outside 0 .. num_classes - 1.
    """
    names = {name: i for i, name in enumerate(read_json(args.class_names))} if args.class_names else {}
    ids = []
    for label in args.class_labels:
        if label not in names and not label.isdigit():
            known = f"one of {args.class_names}" if names else "an id (for names give --class-names FILE)"
            raise ValueError(f"unknown class {label!r}; expected {known}")
        ids.append(names[label] if label in names else int(label))
        if ids[-1] >= args.num_classes:
            raise ValueError(f"class {ids[-1]} is out of range: the model has classes 0 .. {args.num_classes - 1}")
    return [i for i in ids for _ in range(args.images_per_class)]


def main(args: argparse.Namespace) -> None:
    """Load both models, draw, decode, and write the grid."""
    if args.gpt_type != "c2i":
        raise ValueError("this command draws classes; --gpt-type t2i is not for it")
    apply_threads(args)
    allow_tf32()
    ids = class_ids(args)
    output = args.output or f"sample_{args.gpt_type}.png"
    with process_group(args.device) as device:
        tokenizer = load_tokenizer(args, device)
        gpt = load_gpt(args, tokenizer.config.codebook_size, device, DTYPES[args.precision])
        if args.compile:
            gpt.compile()
        started = time.perf_counter()
        codes = draw(gpt, torch.tensor(ids, device=device), args)
        print(f"gpt sampling takes about {time.perf_counter() - started:.2f} seconds.")
        started = time.perf_counter()
        images = decode_codes(tokenizer, codes)
        print(f"decoder takes about {time.perf_counter() - started:.2f} seconds.")
        shown = {name: value for name, value in vars(args).items() if value is not None}
        save_png(make_grid_image(images, args.columns), output, {"settings": shown, "class_ids": ids})
        print(f"image is saved to {output}")


def draw(gpt: torch.nn.Module, labels: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Codes of all `labels`, in batches, with a progress bar over all tokens."""
    torch.manual_seed(args.seed)
    parts = []
    with progress(len(labels) * gpt.block_size, "token") as bar:
        for first in range(0, len(labels), args.batch_size):
            part = labels[first : first + args.batch_size]
            seeds = None if args.legacy_rng else [args.seed + first + i for i in range(len(part))]
            parts.append(sample_codes(gpt, part, args, seeds, functools.partial(_advance, bar, len(part))))
    return torch.cat(parts)


def _advance(bar: tqdm, tokens: int, position: int) -> None:
    bar.update(tokens)


if __name__ == "__main__":
    run(lambda: main(parser().parse_args()))
