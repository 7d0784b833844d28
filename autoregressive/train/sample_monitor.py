"""How far what a GPT in training draws is from real pictures: the same conditions and seeds at every validation."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autoregressive.train.pictures import SamplePictures
from autoregressive.train.step import TrainStep
from evaluations.distance import DistanceMonitor
from evaluations.networks import feature_network
from evaluations.picture_sets import open_pictures
from utils.distributed import get_world_size
from utils.image import to_uint8

Numbers = Callable[[], Mapping[str, float]]
_BATCH = 32


class SampleMonitor:
    """A validation callback: kernel and Frechet distance of the pictures that `drawing` makes, by name.

    The averaged weights draw, where there are some; names then begin with ``ema_``. An FID has the number of pictures
    in its name, as it is the higher the fewer they are.

    Raises:
        ValueError, FileNotFoundError: when the reference or the feature network is missing.
    """

    def __init__(
        self, args: argparse.Namespace, drawing: SamplePictures, step: TrainStep, device: torch.device
    ) -> None:
        if not args.eval_reference:
            raise ValueError(
                "--eval-samples needs --eval-reference: an npz or a folder of real pictures, which "
                "tokenizer/validation/val_ddp.py makes of a data set"
            )
        real = open_pictures(args.eval_reference)
        network = feature_network(args.eval_features, device, args.eval_weights)
        if network is None:
            raise ValueError("--eval-samples needs a feature network; the line above says which there are")
        self.count = len(drawing.conditions)
        self.prefix, self._model = ("", step.model) if step.ema is None else ("ema_", step.ema)
        self._images: Callable[[list[int]], Tensor]  # of `drawing`, while the monitor asks for them
        self._drawing = drawing

        def draw(numbers: list[int]) -> Tensor:
            return to_uint8(self._images(numbers))

        def read(numbers: list[int]) -> Tensor:
            return torch.cat(list(real.batches(range(numbers[0], numbers[-1] + 1), len(numbers))))

        self._monitor = DistanceMonitor(network, read, real.shape[0], draw, self.count, batch_size=_BATCH)

    def __call__(self) -> dict[str, float]:
        names = {"FID": f"FID-{self.count}"}
        with self._drawing.sampling(self._model) as self._images:
            values = self._monitor()
        return {f"{self.prefix}{names.get(name, name)}": value for name, value in values.items()}


def equal_shares(count: int) -> int:
    """`count`, rounded up so that all processes draw equally many: with sharded weights they compute together."""
    return -(-count // get_world_size()) * get_world_size()


def together(first: Numbers | None, second: Numbers) -> Numbers:
    """A callback that gives the numbers of both."""
    return second if first is None else lambda: {**first(), **second()}
