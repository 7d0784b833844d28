"""Tiny engines, and what the project's own `generate` draws, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.noise import ImageNoise
from autoregressive.serve.export import export_model
from autoregressive.serve.llm import LLM
from tests.autoregressive.models.tiny import random_model
from utils.seeding import mix_seed

TINY = {"dim": 64, "n_layer": 3, "n_head": 4, "vocab_size": 97, "block_size": 16}


def tiny(**fields: Any) -> Transformer:
    """A random GPT for 16 codes of 97 and 5 classes."""
    return random_model(**{**TINY, **fields})


def engine(model: Transformer, folder: Path, **options: Any) -> LLM:
    """An engine with the weights of `model`."""
    return LLM(export_model(model, folder / "gpt"), **{"max_images": 8, **options})


def greedy(model: Transformer, cond: Sequence[int] | Tensor, scales: Sequence[float], **options: Any) -> Tensor:
    """The likeliest codes, each image with its own guidance scale."""
    cond = torch.as_tensor(cond)
    masks = options.pop("emb_masks", None)
    rows = []
    for i, scale in enumerate(scales):
        mask = None if masks is None else masks[i : i + 1]
        rows.append(generate(model, cond[i : i + 1], model.block_size, mask, scale, sample_logits=False, **options))
    return torch.cat(rows)


def drawn(model: Transformer, cond: Sequence[int] | Tensor, seeds: Sequence[int], **options: Any) -> Tensor:
    """What the in-process engines draw for these seeds."""
    noise = ImageNoise([mix_seed(seed) for seed in seeds])
    return generate(model, torch.as_tensor(cond), model.block_size, generators=noise, **options)
