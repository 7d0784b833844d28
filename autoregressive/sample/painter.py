"""What the commands share that draw a few pictures to look at: subjects, batches, a grid, single files."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from autoregressive.sample.classes import ClassNames
from autoregressive.sample.pipeline import OnToken
from utils.batches import in_batches
from utils.image import make_grid_image, save_png, to_uint8
from utils.progress import progress

_LONGEST_WORD = 60  # letters of a file's name
DrawCodes = Callable[[list[int], OnToken], Tensor]


class Subject(NamedTuple):
    """What one picture is of: a word for its file's name, and what is noted in the file (such as its class)."""

    word: str
    facts: Mapping[str, Any]


def add_class_args(flags: argparse.ArgumentParser, labels: Sequence[str] | None, output: str) -> None:
    """Which classes, and `add_picture_args`; without `labels` the classes must be given."""
    what = add_picture_args(flags, output, "class")
    required = labels is None
    what.add_argument("--class-labels", nargs="+", default=labels, required=required, help="class ids or names")
    what.add_argument(
        "--class-names", help="JSON list of class names, in the order of their ids; ImageNet's names are known"
    )


def add_picture_args(flags: argparse.ArgumentParser, output: str, each: str) -> argparse._ArgumentGroup:
    """How many pictures of each `each`, and where they go."""
    what = flags.add_argument_group("pictures")
    what.add_argument(f"--images-per-{each}", type=int, default=1, help=f"pictures of each {each}")
    what.add_argument("--batch-size", type=int, default=32, help="pictures drawn at once; halved if memory is short")
    what.add_argument("--columns", type=int, default=4, help="pictures in a row of the grid")
    what.add_argument("--output", help=f"the grid's file; without --output-dir the default is {output}")
    what.add_argument("--output-dir", help="write every picture into this folder, as {number}-{what}.png")
    return what


def class_ids(args: argparse.Namespace, names: ClassNames) -> list[int]:
    """The ids that --class-labels names, each repeated --images-per-class times.

    Raises:
        ValueError: an unknown name, or an id outside 0 .. num_classes - 1.
    """
    if args.images_per_class < 1 or args.batch_size < 1 or args.columns < 1:
        raise ValueError("--images-per-class, --batch-size and --columns are at least 1")
    return [i for label in args.class_labels for i in [names.find(label)] * args.images_per_class]


def class_subjects(ids: Sequence[int], names: ClassNames) -> list[Subject]:
    """The subjects of pictures of these classes."""
    return [Subject(names.name(i) or str(i), {"class_id": i, "class_name": names.name(i)}) for i in ids]


class Painter:
    """Draws pictures number 0 to len(subjects) - 1, batch by batch, and writes those that get a file of their own.

    `draw` gives the codes (B, N) of some numbers and says after which token it is; `decode` makes images of them.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        subjects: Sequence[Subject],
        draw: DrawCodes,
        decode: Callable[[Tensor], Tensor],
        tokens_per_image: int,
    ) -> None:
        self.args, self.subjects, self.draw, self.decode = args, subjects, draw, decode
        self.tokens = len(subjects) * tokens_per_image
        self.settings = {name: value for name, value in vars(args).items() if value is not None}
        self.sampling_seconds = self.decoding_seconds = 0.0

    @property
    def wants_grid(self) -> bool:
        """Whether a grid is written: by --output, and where there are no single files."""
        return bool(self.args.output or not self.args.output_dir)

    def paint(self) -> Tensor:
        """The pictures of the grid on the CPU, float32 (B, 3, H, W): all of them, or none if no grid is wanted."""
        size = self.args.batch_size
        numbers = [range(first, min(first + size, len(self.subjects))) for first in range(0, len(self.subjects), size)]
        parts = []
        with progress(self.tokens, "token") as bar:
            for batch, images in in_batches(lambda batch: self._images(batch, bar), numbers):
                if self.args.output_dir:
                    self._save(batch, images)
                parts.append(images if self.wants_grid else images[:0])  # any number of files fits into memory
        return torch.cat(parts)

    def save_grid(self, images: Tensor, default: str, facts: Mapping[str, Any] | None = None) -> None:
        """Write the grid, and say where everything is."""
        if self.wants_grid:
            output = self.args.output or default
            listed = {f"{name}s": [subject.facts[name] for subject in self.subjects] for name in self.subjects[0].facts}
            about = {"settings": self.settings, **listed, **(facts or {})}
            save_png(make_grid_image(images, self.args.columns), output, about)
            print(f"image is saved to {output}")
        if self.args.output_dir:
            print(f"{len(self.subjects)} pictures are saved to {self.args.output_dir}")

    def _images(self, batch: list[int], bar: tqdm) -> Tensor:
        drawn_before, started = bar.n, time.perf_counter()
        try:
            codes = self.draw(batch, lambda _: bar.update(len(batch)))
            if codes.device.type == "cuda":
                torch.cuda.synchronize()  # so that the time is that of sampling
            drawn = time.perf_counter()
            images = self.decode(codes).cpu()
        except (RuntimeError, MemoryError):
            bar.n = drawn_before  # these tokens are drawn again if the memory did not suffice
            raise
        self.sampling_seconds += drawn - started
        self.decoding_seconds += time.perf_counter() - drawn
        return images

    def _save(self, batch: list[int], images: Tensor) -> None:
        folder = Path(self.args.output_dir)
        for number, picture in zip(batch, to_uint8(images)):
            subject = self.subjects[number]
            word = re.sub(r"[^a-z0-9]+", "-", subject.word.lower()).strip("-")[:_LONGEST_WORD].strip("-") or "picture"
            facts = {**subject.facts, "number": number, "settings": self.settings}
            if not getattr(self.args, "legacy_rng", False):
                facts["seed"] = self.args.seed + number
            save_png(picture, folder / f"{number:06d}-{word}.png", facts)
