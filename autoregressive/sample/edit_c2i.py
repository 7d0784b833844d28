"""Draw parts of a picture anew: in-painting, out-painting, edits by class, variations.

    python3 autoregressive/sample/edit_c2i.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt \
        --image-size 384 --input dog.png --box 128 192 256 384 --class-labels "red panda" --images-per-class 3

Writes one picture: the input, the cells that are drawn anew, what the tokenizer makes of the input, and the results.
The GPT draws row by row and never sees what comes after: docs/sampling.md says what follows from that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from autoregressive.build import latent_grid
from autoregressive.models.generate import Model
from autoregressive.sample import masks
from autoregressive.sample.classes import ClassNames
from autoregressive.sample.editing import edit_codes, last_drawn, paste_outside, with_rest
from autoregressive.sample.painter import Painter, add_class_args, class_ids, class_subjects
from autoregressive.sample.pipeline import OnToken, add_model_args, load_models, make_decoder, sampling_options
from dataset.augmentation import eval_transform
from dataset.images import read_rgb
from tokenizer.coding import encode_images
from utils.args import add_seed_arg, apply_threads, make_parser
from utils.distributed import process_group
from utils.errors import run

DEFAULT_OUTPUT = "edited.png"


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    what = flags.add_argument_group("what is drawn anew", "several of these together: all their cells")
    what.add_argument("--input", required=True, help="the picture; its centre is cut out at --image-size")
    what.add_argument(
        "--box",
        type=int,
        nargs=4,
        action="append",
        default=[],
        metavar="PIXEL",
        help="left top right bottom; repeatable",
    )
    what.add_argument("--mask", help="a picture like the input, white where it is drawn anew")
    what.add_argument(
        "--cells", type=int, nargs="+", default=[], help="numbers of latent cells, row * columns + column"
    )
    what.add_argument("--random-share", type=float, default=0.0, help="this share of the cells: variations")
    what.add_argument("--invert", action="store_true", help="draw everything else: out-painting")
    what.add_argument(
        "--shift",
        type=int,
        nargs=2,
        default=[0, 0],
        metavar=("DOWN", "RIGHT"),
        help="move the picture by so many cells first, and draw what becomes free: out-painting to one side",
    )
    how = flags.add_argument_group("how")
    how.add_argument("--redraw-rest", action="store_true", help="also draw every cell after the first one drawn")
    how.add_argument(
        "--candidates", type=int, default=1, help="draw so many, take the one that the cells kept after it fit best"
    )
    how.add_argument("--paste", action="store_true", help="put the input's own pixels back where nothing was drawn")
    add_class_args(flags, labels=None, output=DEFAULT_OUTPUT)
    add_model_args(flags)
    add_seed_arg(flags, "--seed")
    return flags


def mask_of(args: argparse.Namespace, grid: int, stride: int) -> Tensor:
    """The cells (N,) that the flags choose, but for --shift.

    Raises:
        ValueError: none are chosen, or a flag means nothing.
    """
    mask = masks.of_boxes(args.box, grid, stride) | masks.of_cells(args.cells, grid)
    mask |= masks.at_random(args.random_share, grid, args.seed)
    if args.mask:
        mask |= masks.of_picture(args.mask, grid, stride)
    if args.invert:
        mask = ~mask
    if not mask.any() and args.shift == [0, 0]:
        raise ValueError("nothing is chosen: give --box, --mask, --cells, --random-share or --shift")
    return mask


def main(args: argparse.Namespace) -> None:
    """Read, encode, draw, decode, and write the pictures."""
    apply_threads(args)
    names, grid, stride = ClassNames(args.num_classes, args.class_names), latent_grid(args), args.downsample_size
    ids, mask = class_ids(args, names), mask_of(args, grid, stride)
    original = eval_transform(args.image_size)(read_rgb(args.input))[None]
    with process_group(args.device) as device:
        gpt, tokenizer = load_models(args, device)
        decoder = make_decoder(args, tokenizer)
        codes, free = masks.shift(encode_images(tokenizer, original.to(device)), *args.shift)
        original = original.roll((args.shift[0] * stride, args.shift[1] * stride), dims=(2, 3))
        mask = with_rest(mask | free) if args.redraw_rest else mask | free
        print(f"{int(mask.sum())} of {grid**2} cells are drawn anew")

        def decode(edited: Tensor) -> Tensor:
            images = decoder(edited).cpu()
            return paste_outside(images, original, mask) if args.paste else images

        painter = Painter(
            args,
            class_subjects(ids, names),
            lambda numbers, on_token: edited_codes(numbers, gpt, codes, mask, ids, args, on_token),
            decode,
            (last_drawn(mask) + 1) * args.candidates,
        )
        edits, reconstruction = painter.paint(), decoder(codes).cpu()
    shown = torch.cat([original, _marked(original, mask, stride), reconstruction, edits])
    painter.save_grid(shown, DEFAULT_OUTPUT, {"cells": mask.nonzero().flatten().tolist()})


def edited_codes(
    numbers: list[int],
    gpt: Model,
    codes: Tensor,
    mask: Tensor,
    ids: list[int],
    args: argparse.Namespace,
    on_token: OnToken | None = None,
) -> Tensor:
    """The codes (B, N) of edits with these numbers of the picture `codes` (1, N): edit i is of class ids[i]."""
    return edit_codes(
        gpt,
        codes.expand(len(numbers), -1),
        mask,
        torch.tensor([ids[i] for i in numbers], device=codes.device),
        [args.seed + i for i in numbers],
        candidates=args.candidates,
        on_token=on_token,
        **sampling_options(args),
    )


def _marked(image: Tensor, mask: Tensor, stride: int) -> Tensor:
    """The image with the chosen cells greyed out."""
    return torch.where(masks.as_pixels(mask, stride), 0.15 * image + 0.3, image)


if __name__ == "__main__":
    run(lambda: main(parser().parse_args()))
