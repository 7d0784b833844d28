"""Small GPTs for the tests: those of the goldens, and one with weights from a formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from tests import golden

NO_DROPOUT = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0}
FORMULA_CONFIG = {
    "dim": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "block_size": 16, "num_classes": 10,
    "multiple_of": 8, "caption_dim": 24, **NO_DROPOUT,
}  # fmt: skip


def from_golden(case: golden.Case) -> Transformer:
    """The model of a golden with its weights, in evaluation mode."""
    build = case.config["factory"]
    args = case.config["args"]
    model = Transformer(ModelArgs(**args)) if build == "Transformer" else GPT_models[build](**args)
    return case.fill(model).eval()


def formula_values(rank: int, count: int) -> Tensor:
    """frac(sin(12.9898 i + 78.233 (rank + 1)) * 43758.5453) - 0.5 for i = 1..count, float64."""
    i = np.arange(1, count + 1, dtype=np.float64)
    product = np.sin(12.9898 * i + 78.233 * (rank + 1)) * 43758.5453
    return torch.from_numpy(product - np.floor(product) - 0.5)


def formula_model(**changes: Any) -> Transformer:
    """A model with weights by formula (matrices 0.6 v, vectors 1 + 0.2 v), in evaluation mode."""
    model = Transformer(ModelArgs(**{**FORMULA_CONFIG, **changes}))
    state = model.state_dict()
    for rank, key in enumerate(sorted(state)):
        v = formula_values(rank, state[key].numel()).reshape(state[key].shape)
        state[key] = (0.6 * v if v.ndim > 1 else 1 + 0.2 * v).float()
    model.load_state_dict(state)
    return model.eval()


def random_model(seed: int = 0, head_std: float = 0.3, **fields: Any) -> Transformer:
    """A small random model without dropout whose head is not zero, in evaluation mode."""
    torch.manual_seed(seed)
    config = {"dim": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "block_size": 9, "num_classes": 5,
              "multiple_of": 8, "caption_dim": 6, "initializer_range": 0.3, **NO_DROPOUT}  # fmt: skip
    model = Transformer(ModelArgs(**{**config, **fields}))
    nn.init.normal_(model.output.weight, std=head_std)
    return model.eval()


def captions(batch: int, lengths: list[int], positions: int, width: int = 6) -> tuple[Tensor, Tensor]:
    """Left-padded features (batch, positions, width) with zeroed padding, and their mask."""
    mask = torch.arange(positions) >= positions - torch.tensor(lengths)[:, None]
    return torch.randn(batch, positions, width) * mask[..., None], mask.long()
