"""Draw pictures of classes with a trained GPT and tokenizer.

    python3 autoregressive/sample/sample_c2i.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt \
        --image-size 384 --class-labels "golden retriever" otter 974 --images-per-class 4

Writes a grid, and with --output-dir every picture as a file of its own. Image number i depends on the checkpoint, the
settings, --seed and i alone: it is the first image of --seed SEED+i.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from autoregressive.models.generate import Model
from autoregressive.sample.classes import ClassNames
from autoregressive.sample.painter import Painter, add_class_args, class_ids, class_subjects
from autoregressive.sample.pipeline import OnToken, add_model_args, load_models, make_decoder, sample_codes
from utils.args import add_seed_arg, apply_threads, make_parser
from utils.distributed import process_group
from utils.errors import run

# golden retriever, otter, red panda, geyser, macaw, valley, balloon, arctic fox
IMAGENET_LABELS = ["207", "360", "387", "974", "88", "979", "417", "279"]


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    add_class_args(flags, IMAGENET_LABELS, "sample_{gpt-type}.png")
    add_model_args(flags)
    add_seed_arg(flags, "--seed")
    flags.add_argument(
        "--legacy-rng", action="store_true", help="draw from the global generator, as upstream's seeds do"
    )
    return flags


def codes_of(
    numbers: list[int], gpt: Model, ids: list[int], args: argparse.Namespace, on_token: OnToken | None = None
) -> Tensor:
    """The codes (B, N) of pictures with these numbers: picture i is of class ids[i]."""
    labels = torch.tensor([ids[i] for i in numbers], device=gpt.tok_embeddings.weight.device)
    seeds = None if args.legacy_rng else [args.seed + i for i in numbers]
    return sample_codes(gpt, labels, args, seeds, on_token)


def main(args: argparse.Namespace) -> None:
    """Load both models, draw, decode, and write the pictures."""
    apply_threads(args)
    names = ClassNames(args.num_classes, args.class_names)
    ids = class_ids(args, names)
    with process_group(args.device) as device:
        gpt, tokenizer = load_models(args, device)
        painter = Painter(
            args,
            class_subjects(ids, names),
            lambda numbers, on_token: codes_of(numbers, gpt, ids, args, on_token),
            make_decoder(args, tokenizer),
            gpt.block_size,
        )
        torch.manual_seed(args.seed)
        images = painter.paint()
    print(f"gpt sampling takes about {painter.sampling_seconds:.2f} seconds.")
    print(f"decoder takes about {painter.decoding_seconds:.2f} seconds.")
    painter.save_grid(images, f"sample_{args.gpt_type}.png")


if __name__ == "__main__":
    run(lambda: main(parser().parse_args()))
