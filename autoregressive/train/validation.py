"""How well a GPT predicts codes that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoregressive.models.gpt import Transformer
from dataset.imagenet import CodeDataset
from utils.distributed import get_rank, get_world_size, sum_over_ranks
from utils.precision import autocast


class FirstViews(Dataset):
    """The first view (the centre crop, or the first of ten) of each image: codes (N,) int64 and label () int64."""

    def __init__(self, codes: CodeDataset) -> None:
        self.codes = codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.codes.view(index, 0)


@torch.no_grad()
def likelihood(
    model: Transformer, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, precision: str = "none"
) -> dict[str, float]:
    """Mean negative log-likelihood over all tokens of `batches`, which every rank sees in the same order.

    Returns ``loss`` (nats per token) and ``bits_per_token``. The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for number, (codes, labels) in enumerate(batches):
        if number % get_world_size() == get_rank():
            codes, labels = codes.to(device), labels.to(device)
            with autocast(device, precision):
                _, loss = model(idx=codes[:, :-1], cond_idx=labels, targets=codes)
            total += torch.stack([loss.double() * codes.numel(), torch.tensor(codes.numel(), device=device)])
    model.train(was_training)
    nll, tokens = sum_over_ranks(total).tolist()
    loss = nll / max(tokens, 1)
    return {"loss": loss, "bits_per_token": loss / math.log(2)}
