"""From a command's arguments to a tokenizer: the one place where flags meet the model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenizer.coding import layout_of
from tokenizer.tokenizer_image.quantizers import QUANTIZERS, code_shape, kind_of
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
    group.add_argument(
        "--codebook-embed-dim", type=int, default=8, help="width of a codebook entry; fsq and lfq have their own"
    )
    group.add_argument(
        "--codebook-l2-norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="codes of length 1, for --quantizer vq",
    )
    group.add_argument(
        "--quantizer",
        choices=list(QUANTIZERS),
        default="vq",
        help="vq: the established one; ema: plain, codes are running means; fsq: rounded channels; lfq: signs; "
        "ibq: gradients through the choice of the code",
    )
    group.add_argument(
        "--fsq-levels", type=int, nargs="+", help="levels of each channel; their product is the number of codes"
    )


def add_decode_precision_arg(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """In what format images are decoded."""
    parser.add_argument(
        "--decode-precision",
        choices=["none", "bf16", "fp16"],
        default="none",
        help="format of the decoder's weights and feature maps; none is float32. Images are always encoded in float32",
    )


def build_tokenizer(args: argparse.Namespace, **fields: Any) -> VQModel:
    """A new tokenizer; `fields` are further `ModelArgs` fields. `args` may lack flags that came with time.

    Raises:
        ValueError: when --codebook-size and --fsq-levels contradict each other, or the quantizer has no such size.
    """
    fields |= {"quantizer": getattr(args, "quantizer", "vq"), "fsq_levels": getattr(args, "fsq_levels", None)}
    fields.setdefault("codebook_l2_norm", getattr(args, "codebook_l2_norm", True))
    if args.codebook_size:
        fields["codebook_size"] = args.codebook_size
    if fields["fsq_levels"]:
        _check_levels(fields["quantizer"], fields["fsq_levels"], args.codebook_size)
    return VQ_models[args.vq_model](codebook_embed_dim=args.codebook_embed_dim, **fields)


def _check_levels(quantizer: str, levels: list[int], codebook_size: int | None) -> None:
    if quantizer != "fsq":
        raise ValueError(f"--fsq-levels is for --quantizer fsq, but the quantizer is {quantizer}")
    codes, _ = code_shape("fsq", 0, 0, levels)
    if codebook_size and codebook_size != codes:
        raise ValueError(
            f"--fsq-levels {' '.join(map(str, levels))} makes {codes} codes, but --codebook-size is {codebook_size}; "
            f"leave --codebook-size out"
        )


def load_tokenizer(args: argparse.Namespace, device: torch.device) -> VQModel:
    """The tokenizer of `args` with the weights of --vq-ckpt (the averaged ones if it has them), in evaluation mode.

    Raises:
        CheckpointError: no checkpoint given, or one for another model.
    """
    if not args.vq_ckpt:
        raise checkpoint.CheckpointError("--vq-ckpt is missing: give the tokenizer's checkpoint")
    model, content = build_tokenizer(args), checkpoint.read(args.vq_ckpt)
    _refuse_other_norm(content.get("args"), model, args.vq_ckpt)
    weights = checkpoint.state_dict_of(content, args.vq_ckpt, prefer_ema=True)
    checkpoint.fit(model, weights, args.vq_ckpt, describe_weights)
    return model.to(device, memory_format=layout_of(device)).eval()


def _refuse_other_norm(trained_with: Any, model: VQModel, source: str) -> None:
    """Weights do not show whether codes are normalised when they are used; the flags they were trained with do."""
    known = vars(trained_with) if isinstance(trained_with, argparse.Namespace) else trained_with
    if not isinstance(known, Mapping):  # weights alone
        return
    stored = known.get("codebook_l2_norm", model.config.codebook_l2_norm)
    if model.config.quantizer == "vq" and stored != model.config.codebook_l2_norm:
        raise checkpoint.CheckpointError(
            f"{source} was trained with --{'' if stored else 'no-'}codebook-l2-norm; give the same flag"
        )


def describe_weights(weights: Mapping[str, Tensor]) -> str | None:
    """What tokenizer these weights are of, in the words of the flags."""
    own = {key.removeprefix("quantize."): value for key, value in weights.items() if key.startswith("quantize.")}
    kind = kind_of(list(own))
    if kind is None:
        return "these are the weights of a GPT, not of a tokenizer" if "tok_embeddings.weight" in weights else None
    with torch.device("meta"):
        known = {name: make().encoder.state_dict() for name, make in VQ_models.items()}
    shapes = {k.removeprefix("encoder."): v.shape for k, v in weights.items() if k.startswith("encoder.")}
    names = [name for name, state in known.items() if shapes == {k: state[k].shape for k in state if k in shapes}]
    facts = [f"--vq-model {names[0]}"] if names else []
    facts += [] if kind == "vq" else [f"--quantizer {kind}"]
    return f"it would fit {' '.join([*facts, _code_flags(kind, own)])}"


def _code_flags(kind: str, own: Mapping[str, Tensor]) -> str:
    if kind == "fsq":
        return f"--fsq-levels {' '.join(map(str, own['levels'].tolist()))}"
    if kind == "lfq":
        return f"--codebook-size {2 ** len(own['bit_values'])}"
    size, width = own["embedding.weight"].shape
    return f"--codebook-size {size} --codebook-embed-dim {width}"
