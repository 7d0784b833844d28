"""Draw pictures of classes with a trained GPT and tokenizer.

    python3 autoregressive/sample/sample_c2i.py --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt \
        --image-size 384 --class-labels "golden retriever" otter 974 --images-per-class 4

Writes a grid, and with --output-dir every picture as a file of its own. Image number i depends on the checkpoint, the
settings, --seed and i alone: it is the first image of --seed SEED+i.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor
from tqdm import tqdm

from autoregressive.build import add_gpt_args
from autoregressive.models.gpt import Transformer
from autoregressive.sample.classes import ClassNames
from autoregressive.sample.pipeline import add_sampling_args, decode_codes, load_models, sample_codes
from tokenizer.build import add_vq_args
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.args import add_runtime_args, add_seed_arg, apply_threads, make_parser
from utils.batches import in_batches
from utils.distributed import process_group
from utils.errors import run
from utils.image import make_grid_image, save_png, to_uint8
from utils.progress import progress

# golden retriever, otter, red panda, geyser, macaw, valley, balloon, arctic fox
IMAGENET_LABELS = ["207", "360", "387", "974", "88", "979", "417", "279"]


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    what = flags.add_argument_group("pictures")
    what.add_argument("--class-labels", nargs="+", default=IMAGENET_LABELS, help="class ids or names")
    what.add_argument(
        "--class-names", help="JSON list of class names, in the order of their ids; ImageNet's names are known"
    )
    what.add_argument("--images-per-class", type=int, default=1, help="pictures of each class")
    what.add_argument("--batch-size", type=int, default=32, help="pictures drawn at once; halved if memory is short")
    what.add_argument("--columns", type=int, default=4, help="pictures in a row of the grid")
    what.add_argument("--output", help="the grid's file; the default is sample_{gpt-type}.png without --output-dir")
    what.add_argument("--output-dir", help="write every picture into this folder as well, {number}-{class}.png")
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


def class_ids(args: argparse.Namespace, names: ClassNames) -> list[int]:
    """The ids that --class-labels names, each repeated --images-per-class times.

    Raises:
        ValueError: an unknown name, or an id outside 0 .. num_classes - 1.
    """
    if args.images_per_class < 1 or args.batch_size < 1 or args.columns < 1:
        raise ValueError("--images-per-class, --batch-size and --columns are at least 1")
    return [i for label in args.class_labels for i in [names.find(label)] * args.images_per_class]


def main(args: argparse.Namespace) -> None:
    """Load both models, draw, decode, and write the pictures."""
    if args.gpt_type != "c2i":
        raise ValueError("this command draws classes; --gpt-type t2i is not for it")
    apply_threads(args)
    names = ClassNames(args.num_classes, args.class_names)
    ids = class_ids(args, names)
    output = args.output or (None if args.output_dir else f"sample_{args.gpt_type}.png")
    with process_group(args.device) as device:
        painter = Painter(*load_models(args, device), args, ids, names)
        images = painter.paint()
        print(f"gpt sampling takes about {painter.sampling_seconds:.2f} seconds.")
        print(f"decoder takes about {painter.decoding_seconds:.2f} seconds.")
    if output:
        facts = {"settings": painter.settings, "class_ids": ids, "class_names": [names.name(i) for i in ids]}
        save_png(make_grid_image(images, args.columns), output, facts)
        print(f"image is saved to {output}")
    if args.output_dir:
        print(f"{len(ids)} pictures are saved to {args.output_dir}")


class Painter:
    """Draws the pictures of `ids`, batch by batch, and writes those that get a file of their own."""

    def __init__(
        self, gpt: Transformer, tokenizer: VQModel, args: argparse.Namespace, ids: list[int], names: ClassNames
    ) -> None:
        self.gpt, self.tokenizer, self.args, self.ids, self.names = gpt, tokenizer, args, ids, names
        self.settings = {name: value for name, value in vars(args).items() if value is not None}
        self.device = gpt.tok_embeddings.weight.device
        self.sampling_seconds = self.decoding_seconds = 0.0
        torch.manual_seed(args.seed)

    def paint(self) -> Tensor:
        """All pictures on the CPU, float32 (B, 3, H, W)."""
        size = self.args.batch_size
        numbers = [range(first, min(first + size, len(self.ids))) for first in range(0, len(self.ids), size)]
        parts = []
        with progress(len(self.ids) * self.gpt.block_size, "token") as bar:
            for batch, images in in_batches(functools.partial(self.draw, bar), numbers):
                if self.args.output_dir:
                    self._save(batch, images)
                parts.append(images)
        return torch.cat(parts)

    def draw(self, bar: tqdm, batch: list[int]) -> Tensor:
        """The pictures of these numbers."""
        drawn_before, started = bar.n, time.perf_counter()
        try:
            codes = self.codes(batch, lambda _: bar.update(len(batch)))
            drawn = time.perf_counter()
            images = decode_codes(self.tokenizer, codes).cpu()
        except RuntimeError:
            bar.n = drawn_before  # these tokens are drawn again if the memory did not suffice
            raise
        self.sampling_seconds += drawn - started
        self.decoding_seconds += time.perf_counter() - drawn
        return images

    def codes(self, batch: list[int], on_token: Any = None) -> Tensor:
        """The codes of these numbers, int32 (B, N)."""
        labels = torch.tensor([self.ids[i] for i in batch], device=self.device)
        seeds = None if self.args.legacy_rng else [self.args.seed + i for i in batch]
        codes = sample_codes(self.gpt, labels, self.args, seeds, on_token)
        if codes.device.type == "cuda":
            torch.cuda.synchronize()  # so that the time is that of sampling
        return codes

    def _save(self, batch: list[int], images: Tensor) -> None:
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in zip(batch, to_uint8(images)):
            class_id = self.ids[number]
            name = self.names.name(class_id)
            facts = {"class_id": class_id, "class_name": name, "number": number, "settings": self.settings}
            facts["seed"] = None if self.args.legacy_rng else self.args.seed + number
            short = re.sub(r"[^a-z0-9]+", "-", (name or str(class_id)).lower()).strip("-")
            save_png(picture, folder / f"{number:06d}-{short or class_id}.png", facts)


if __name__ == "__main__":
    run(lambda: main(parser().parse_args()))
