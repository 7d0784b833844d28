"""How well a GPT predicts codes that it was not trained on: negative log-likelihood, whole and by position."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autoregressive.models.gpt import Transformer
from dataset.imagenet import CodeDataset
from dataset.t2i import Text2ImgDatasetCode
from utils.distributed import get_rank, get_world_size, sum_over_ranks
from utils.precision import autocast
from utils.progress import progress

BATCH_SIZE = 32  # images of each process at a time


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
    """This process's share of held-out codes: every process gets equally many, filled up with weight 0.

    Equally many, because with sharded weights all processes have to compute together. Items are (codes (N,), weight,
    condition, and for captions the attention mask); of an image with several views it is the first, which is the
    centre crop, or the first of ten. `images` bounds how many are taken, spread evenly.
    """

    def __init__(self, codes: CodeDataset | Text2ImgDatasetCode, images: int | None = None) -> None:
        count = min(len(codes), images or len(codes))
        chosen = torch.linspace(0, len(codes) - 1, count).round().long().tolist()
        own = chosen[get_rank() :: get_world_size()]
        fillers = -(-count // get_world_size()) - len(own)
        self.codes, self.indices = codes, [*own, *chosen[:1] * fillers]
        self.weights = [1.0] * len(own) + [0.0] * fillers

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, ...]:
        index, weight = self.indices[place], self.weights[place]
        if isinstance(self.codes, CodeDataset):
            codes, label = self.codes.view(index, 0)
            return codes, torch.tensor(weight), label
        codes, features, mask, valid = self.codes[index]
        return codes[0], weight * valid.float(), features[0], mask


def model_inputs(codes: Tensor, condition: Tensor, mask: Tensor | None = None) -> dict[str, Tensor | None]:
    """How the GPT is asked for the likelihood of codes (B, N): all but the last go in, after the condition.

    `mask` (B, 1, L, L) covers the condition and all N codes, as the data sets give it.
    """
    return {"idx": codes[:, :-1], "cond_idx": condition, "mask": None if mask is None else mask[:, :, :-1, :-1]}


@torch.no_grad()
def likelihood(
    model: Transformer,
    held_out: Dataset,
    device: torch.device,
    precision: str = "none",
    batch_size: int = BATCH_SIZE,
    what: str | None = None,
) -> Likelihood:
    """Measure `held_out` (a `HeldOut`) on all processes together; every one gets the same answer.

    The model is left in the mode it was in. `what` names a progress bar, none is shown without it.
    """
    was_training = model.training
    model.eval()
    loader: Iterable[Any] = DataLoader(held_out, batch_size=batch_size)
    total = torch.zeros(model.block_size + 1, dtype=torch.float64, device=device)
    with progress(len(held_out), "image", what=what or "", hidden=what is None) as bar:  # type: ignore[arg-type]
        for batch in loader:
            codes, weights, *condition = (part.to(device) for part in batch)
            with autocast(device, precision):
                logits, _ = model(**model_inputs(codes, *condition))
            nats = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
            total[:-1] += (nats * weights[:, None]).sum(dim=0, dtype=torch.float64)
            total[-1] += weights.sum()
            bar.update(len(codes))
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
        model: Transformer,
        ema: Transformer | None,
        device: torch.device,
        precision: str,
    ) -> None:
        self.held_out, self.models = held_out, {"": model} | ({"ema_": ema} if ema is not None else {})
        self.device, self.precision = device, precision

    def __call__(self) -> dict[str, float]:
        """``loss`` and ``bits_per_token``, and the same of the averaged weights as ``ema_...``."""
        numbers = {}
        for prefix, model in self.models.items():
            found = likelihood(model, self.held_out, self.device, self.precision)
            numbers |= {f"{prefix}loss": found.loss, f"{prefix}bits_per_token": found.bits_per_token}
        return numbers
