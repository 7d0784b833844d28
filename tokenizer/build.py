"""From a command's arguments to a tokenizer: the one place where flags meet the model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils import checkpoint


def add_vq_args(parser: argparse.ArgumentParser, ckpt_required: bool = False) -> None:
    """Which tokenizer, and where its weights are."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vq-model", choices=list(VQ_models), default="VQ-16", help="size")
    group.add_argument("--vq-ckpt", required=ckpt_required, help="checkpoint, in any known format")
    group.add_argument(
        "--codebook-size", type=int, help="codebook entries; the default is the model's own (VQ-16: 16384)"
    )
    group.add_argument("--codebook-embed-dim", type=int, default=8, help="width of a codebook entry")


def build_tokenizer(args: argparse.Namespace, **fields: Any) -> VQModel:
    """A new tokenizer; `fields` are further `ModelArgs` fields."""
    if args.codebook_size:
        fields["codebook_size"] = args.codebook_size
    return VQ_models[args.vq_model](codebook_embed_dim=args.codebook_embed_dim, **fields)


def load_tokenizer(args: argparse.Namespace, device: torch.device) -> VQModel:
    """The tokenizer of `args` with the weights of --vq-ckpt (the averaged ones if it has them), in evaluation mode.

    Raises:
        CheckpointError: no checkpoint given, or one for another model.
    """
    if not args.vq_ckpt:
        raise checkpoint.CheckpointError("--vq-ckpt is missing: give the tokenizer's checkpoint")
    model = build_tokenizer(args)
    checkpoint.load_weights(model, args.vq_ckpt, prefer_ema=True, suggest=describe_weights)
    return model.to(device, memory_format=torch.channels_last).eval()  # convolutions are faster in this layout


def describe_weights(weights: Mapping[str, Tensor]) -> str | None:
    """What tokenizer these weights are of, in the words of the flags."""
    codebook = weights.get("quantize.embedding.weight")
    if codebook is None:
        return "these are the weights of a GPT, not of a tokenizer" if "tok_embeddings.weight" in weights else None
    with torch.device("meta"):
        own = {name: make().state_dict() for name, make in VQ_models.items()}
    shapes = {k: v.shape for k, v in weights.items() if k.startswith("encoder.")}
    names = [name for name, state in own.items() if shapes == {k: state[k].shape for k in state if k in shapes}]
    facts = [f"--vq-model {names[0]}"] if names else []
    facts += [f"--codebook-size {codebook.shape[0]} --codebook-embed-dim {codebook.shape[1]}"]
    return f"it would fit {' '.join(facts)}"
