"""From class labels to pictures: GPT, then the tokenizer's decoder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.seeding import mix_seed


def add_sampling_args(parser: argparse.ArgumentParser, cfg_scale: float = 4.0, top_k: int = 2000) -> None:
    """Guidance, filtering and precision of sampling."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg-scale", type=float, default=cfg_scale, help="guidance scale; 1 and less is no guidance")
    group.add_argument("--cfg-interval", type=float, default=-1, help="last decode step that is guided; -1: all")
    group.add_argument("--top-k", type=int, default=top_k, help="draw from the k likeliest codes; 0: all")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest codes of this mass; 1: all")
    group.add_argument("--temperature", type=float, default=1.0, help="below 1: likelier codes, above 1: more variety")
    group.add_argument(
        "--precision", choices=["none", "fp16", "bf16"], default="bf16", help="format of the GPT's weights"
    )


def sample_codes(
    gpt: Transformer,
    labels: Tensor,
    args: argparse.Namespace,
    seeds: Sequence[int] | None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw the codes of one image for each of `labels` (B,): int32 (B, N).

    With `seeds` every image has a generator of its own, so it does not depend on the batch it is drawn in; with None
    all draws come from torch's global generator in the established order.
    """
    generators = None
    if seeds is not None:
        generators = [torch.Generator(labels.device).manual_seed(mix_seed(seed)) for seed in seeds]
    return generate(
        gpt,
        labels,
        gpt.block_size,
        cfg_scale=args.cfg_scale,
        cfg_interval=args.cfg_interval,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        sample_logits=True,
        generators=generators,
        on_token=on_token,
    )


@torch.no_grad()
def decode_codes(tokenizer: VQModel, codes: Tensor, batch_size: int = 16) -> Tensor:
    """Pictures of codes (B, h*w) on a square grid: (B, 3, H, W) float32, nominally in [-1, 1]."""
    edge = int(codes.shape[1] ** 0.5)
    width = tokenizer.config.codebook_embed_dim
    parts = [tokenizer.decode_code(part, (len(part), width, edge, edge)) for part in codes.split(batch_size)]
    return torch.cat(parts)
