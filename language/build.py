"""From a command's arguments to a text encoder: the one place where flags meet the encoders."""

from __future__ import annotations

import argparse

import torch

from language.embedder import TextEmbedder
from language.minilm import MiniLMEmbedder
from language.t5 import T5Embedder
from utils.precision import DTYPES


def add_text_encoder_args(
    group: argparse._ArgumentGroup, parent_flag: str = "--t5-path", parent: str = "pretrained_models/t5-ckpt"
) -> None:
    """Which text encoder, and where it lies."""
    group.add_argument(
        "--text-encoder",
        choices=["t5", "minilm"],
        default="t5",
        help="minilm needs no download; a GPT knows the one it was trained with",
    )
    group.add_argument(parent_flag, default=parent, help="folder that holds the folder of the T5 encoder")
    group.add_argument("--t5-model-type", default="flan-t5-xl", help="folder of the T5 encoder in it")
    group.add_argument("--t5-feature-max-len", type=int, default=120, help="tokens of a caption; the rest is cut off")


def load_text_encoder(args: argparse.Namespace, parent: str, device: torch.device) -> TextEmbedder:
    """The encoder of `args` with weights in the format of --precision; `parent` holds the T5 folder.

    Raises:
        ValueError: when it is not there, or a caption would have no tokens.
    """
    if args.t5_feature_max_len < 1:
        raise ValueError(f"--t5-feature-max-len must be at least 1, found {args.t5_feature_max_len}")
    dtype, length = DTYPES[args.precision], args.t5_feature_max_len
    if args.text_encoder == "minilm":
        return MiniLMEmbedder(device, torch_dtype=dtype, model_max_length=length)
    return T5Embedder(
        device, args.t5_model_type, local_cache=True, cache_dir=parent, torch_dtype=dtype, model_max_length=length
    )
