"""From a command's arguments to a GPT: the one place where flags meet the model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.models.gpt import GPT_models, Transformer
from utils import checkpoint


def add_gpt_args(parser: argparse.ArgumentParser, gpt_type: str = "c2i", image_size: int = 256) -> None:
    """Which GPT, and the shape of what it predicts (not stored in the weights, so it must be given)."""
    group = parser.add_argument_group("GPT")
    group.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size")
    group.add_argument("--gpt-ckpt", help="checkpoint, in any known format")
    group.add_argument("--gpt-type", choices=["c2i", "t2i"], default=gpt_type, help="condition: class or text")
    group.add_argument("--cls-token-num", type=int, default=1 if gpt_type == "c2i" else 120, help="prefix positions")
    group.add_argument("--caption-dim", type=int, default=2048, help="length of a text token's features (t2i)")
    group.add_argument("--num-classes", type=int, default=1000, help="classes; the null class comes after them")
    group.add_argument("--image-size", type=int, default=image_size, help="edge of the images in pixels")
    group.add_argument("--downsample-size", type=int, default=16, help="pixels per code along an edge")


def latent_grid(args: argparse.Namespace) -> int:
    """Codes along an edge of the image.

    Raises:
        ValueError: when --image-size is not a multiple of --downsample-size.
    """
    if args.image_size % args.downsample_size:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of --downsample-size {args.downsample_size}: "
            f"the tokenizer cuts an image into whole cells"
        )
    return args.image_size // args.downsample_size


def build_gpt(args: argparse.Namespace, vocab_size: int, **fields: float) -> Transformer:
    """A new GPT; `fields` are further `ModelArgs` fields (dropouts)."""
    return GPT_models[args.gpt_model](
        vocab_size=vocab_size,
        block_size=latent_grid(args) ** 2,
        num_classes=args.num_classes,
        cls_token_num=args.cls_token_num,
        model_type=args.gpt_type,
        caption_dim=args.caption_dim,
        **fields,
    )


def load_gpt(
    args: argparse.Namespace, vocab_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Transformer:
    """The GPT of `args` with the weights of --gpt-ckpt, in evaluation mode, cast to `dtype`.

    Raises:
        CheckpointError: no checkpoint given, or one for another model.
    """
    if not args.gpt_ckpt:
        raise checkpoint.CheckpointError("--gpt-ckpt is missing: give the GPT's checkpoint")
    weights = checkpoint.state_dict_of(checkpoint.read(args.gpt_ckpt), args.gpt_ckpt, getattr(args, "use_ema", False))
    table = weights.get("cls_embedding.embedding_table.weight")
    without_null = table is not None and len(table) == args.num_classes
    model = build_gpt(args, vocab_size, **({"class_dropout_prob": 0.0} if without_null else {}))
    checkpoint.fit(model, weights, args.gpt_ckpt, describe_weights)
    return model.to(device=device, dtype=dtype).eval()


def require_null_class(model: Transformer, args: argparse.Namespace) -> None:
    """Stop early when --cfg-scale asks for guidance and the checkpoint has no null class.

    Raises:
        ValueError: says what the checkpoint has.
    """
    if model.model_type != "c2i" or args.cfg_scale <= 1 or model.cls_embedding.dropout_prob > 0:
        return
    raise ValueError(
        f"--cfg-scale {args.cfg_scale} needs a null class, but {args.gpt_ckpt} has {args.num_classes} class "
        f"embeddings, as many as --num-classes: it was trained without class dropout (then draw with --cfg-scale 1), "
        f"or it has {args.num_classes - 1} classes and a null class (then give --num-classes {args.num_classes - 1})"
    )


def describe_weights(weights: Mapping[str, Tensor]) -> str | None:
    """What model these weights are of, in the words of the flags; None when they are of no GPT."""
    embedding = weights.get("tok_embeddings.weight")
    if embedding is None:
        return "these are not the weights of a GPT" if any("quantize." in key for key in weights) else None
    layers = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("layers.")), default=-1)
    vocab_size, dim = embedding.shape
    sizes = [name for name, make in GPT_models.items() if _shape_of(make) == (layers, dim)]
    facts = [f"--gpt-model {sizes[0]}" if sizes else f"a GPT with {layers} layers of width {dim}"]
    facts.append(f"--vocab-size (in samplers --codebook-size) {vocab_size}")
    classes = weights.get("cls_embedding.embedding_table.weight")
    if classes is None:
        captions = weights.get("cls_embedding.cap_proj.fc1.weight")
        facts.append("--gpt-type t2i" + (f" --caption-dim {captions.shape[1]}" if captions is not None else ""))
    else:
        facts.append(f"--gpt-type c2i --num-classes {classes.shape[0] - 1}")
    return f"it would fit {' '.join(facts)}"


def _shape_of(make) -> tuple[int, int]:
    with torch.device("meta"):
        config = make().config
    return config.n_layer, config.dim


def checkpoint_tag(path: str, from_fsdp: bool = False) -> str:
    """The part of a sample folder's name that stands for the checkpoint: the file's stem, or the FSDP step folder."""
    return Path(path).resolve().parent.name if from_fsdp else Path(path).name.removesuffix(".pth").removesuffix(".pt")
