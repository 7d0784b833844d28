"""How well a GPT predicts codes that it was not trained on: negative log-likelihood, whole and by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autoregressive.models.gpt import Transformer
from utils.distributed import get_rank, get_world_size, sum_over_ranks
from utils.precision import autocast
from utils.progress import progress

BATCH_SIZE = 32  # images of each process at a time

Inputs = Callable[[Sequence[Tensor]], dict[str, Tensor]]  # a batch -> arguments of Transformer.forward, on the device


@dataclass(frozen=True)
class Likelihood:
    """Mean negative log-likelihood of the codes of held-out images.

    Attributes:
        nats: float64 (N,), of each position.
        images: how many images were measured.
    """

    nats: Tensor
    images: int

    @property
    def loss(self) -> float:
        """Nats per token, what training calls its loss."""
        return self.nats.mean().item()

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)

    @property
    def bits_per_image(self) -> float:
        return self.bits_per_token * len(self.nats)

    @property
    def bits_by_position(self) -> list[float]:
        return (self.nats / math.log(2)).tolist()


class HeldOut(Dataset):
    """This process's share of held-out samples: every process gets equally many, filled up with weight 0.

    Equally many, because with sharded weights all processes have to compute together. Items are the data set's with
    a weight in front; of codes with several views it is the first, which is the centre crop, or the first of ten.
    `images` bounds how many are taken, spread evenly.
    """

    def __init__(self, samples: Any, images: int | None = None) -> None:
        count = min(len(samples), images or len(samples))
        chosen = torch.linspace(0, len(samples) - 1, count).round().long().tolist()
        own = chosen[get_rank() :: get_world_size()]
        fillers = -(-count // get_world_size()) - len(own)
        self.samples, self.indices = samples, [*own, *chosen[:1] * fillers]
        self.weights = [1.0] * len(own) + [0.0] * fillers

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, ...]:
        index = self.indices[place]
        item = self.samples.view(index, 0) if hasattr(self.samples, "view") else self.samples[index]
        return torch.tensor(self.weights[place]), *item


@torch.no_grad()
def likelihood(
    model: Transformer,
    held_out: HeldOut,
    inputs: Inputs,
    device: torch.device,
    precision: str = "none",
    batch_size: int = BATCH_SIZE,
    what: str | None = None,
) -> Likelihood:
    """Measure `held_out` on all processes together; every one gets the same answer.

    `inputs` makes the model's arguments of a batch; samples that it calls invalid do not count. The model is left in
    the mode it was in. `what` names a progress bar, none is shown without it.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(model.block_size + 1, dtype=torch.float64, device=device)
    with progress(len(held_out), "image", what=what or "", hidden=what is None) as bar:
        for weights, *batch in DataLoader(held_out, batch_size=batch_size):
            arguments = inputs(batch)
            targets, valid = arguments.pop("targets"), arguments.pop("valid", 1)
            with autocast(device, precision):
                logits, _ = model(**arguments)
            nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            counts = weights.to(device) * valid
            total[:-1] += (nats * counts[:, None]).sum(dim=0, dtype=torch.float64)
            total[-1] += counts.sum()
            bar.update(len(targets))
    reshard(model)
    model.train(was_training)
    *sums, images = sum_over_ranks(total).tolist()
    if not images:
        raise ValueError("there is no valid held-out image to measure the likelihood of")
    return Likelihood(torch.tensor(sums, dtype=torch.float64) / images, round(images))


def reshard(model: nn.Module) -> None:
    """Give up whole weights that FSDP2 keeps after a forward pass without a backward; they would go stale."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


class Validator:
    """What training reports: the likelihood of held-out codes, also under the averaged weights."""

    def __init__(
        self,
        held_out: HeldOut,
        inputs: Inputs,
        model: Transformer,
        ema: Transformer | None,
        device: torch.device,
        precision: str,
    ) -> None:
        self.held_out, self.inputs = held_out, inputs
        self.models = {"": model} | ({"ema_": ema} if ema is not None else {})
        self.device, self.precision = device, precision

    def __call__(self) -> dict[str, float]:
        """``loss`` and ``bits_per_token``, and the same of the averaged weights as ``ema_...``."""
        numbers = {}
        for prefix, model in self.models.items():
            found = likelihood(model, self.held_out, self.inputs, self.device, self.precision)
            numbers |= {f"{prefix}loss": found.loss, f"{prefix}bits_per_token": found.bits_per_token}
        return numbers
