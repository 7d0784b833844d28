"""What is looked at before a training begins: are these the codes one thinks they are?"""

from __future__ import annotations

import argparse
import logging
import math
from typing import Any

import torch
from torch import Tensor

from dataset.imagenet import CodeDataset
from dataset.t2i import Text2ImgDatasetCode

LOOKED_AT = 2_000  # images whose codes are counted
COMPARED = 20_000  # images of either side that are compared with those of the other


def check_codes(args: argparse.Namespace, codes: Any, held_out: Any | None, logger: logging.Logger) -> None:
    """Say in the log what the codes are like, and warn of what looks wrong. Images that are encoded on the fly are
    passed over.

    Codes outside the vocabulary and labels outside the classes are errors of reading, which this provokes.

    Raises:
        ValueError: codes or labels out of range.
    """
    if not isinstance(codes, CodeDataset | Text2ImgDatasetCode):
        return
    chosen = spread(len(codes), LOOKED_AT)
    tokens = torch.stack([first_view(codes, index) for index in chosen])
    logger.info(describe_codes(tokens, len(codes), args.vocab_size))
    if isinstance(codes, CodeDataset):
        labels = torch.stack([codes.view(index, 0)[1] for index in chosen])
        logger.info(f"Labels: {labels.min()} to {labels.max()}, {labels.unique().numel()} different ones")
        _warn_of_classes(args, codes, logger)
    if held_out is not None:
        _warn_of_overlap(codes, held_out, logger)


def describe_codes(tokens: Tensor, total: int, vocab_size: int) -> str:
    """One line on codes (n, N): how many of the vocabulary occur, and the losses to expect of a model that knows
    nothing, and of one that knows how frequent each code is."""
    counts = torch.bincount(tokens.flatten(), minlength=vocab_size).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum().item()
    line = (
        f"Codes: looked at {len(tokens):,} of {total:,} images; {len(shares):,} of {vocab_size:,} codes occur. "
        f"A new model's loss is ln {vocab_size} = {math.log(vocab_size):.3f}, "
        f"one that knows the codes' frequencies alone is at {entropy:.3f}"
    )
    if len(shares) < 0.02 * vocab_size:
        line += "; WARNING: hardly any code is in use, is the tokenizer trained?"
    return line


def _warn_of_classes(args: argparse.Namespace, codes: CodeDataset, logger: logging.Logger) -> None:
    known = len(getattr(codes.source, "manifest", {}).get("classes") or ())
    if known and known != args.num_classes:
        logger.info(f"WARNING: the codes are of {known} classes, --num-classes is {args.num_classes}")


def _warn_of_overlap(codes: Any, held_out: Any, logger: logging.Logger) -> None:
    first, second = (_source_hash(part) for part in (codes, held_out))
    if first and first == second:
        logger.info("WARNING: the held-out codes are of the same images as the training codes (equal source_sha256)")
    common, compared = overlap(codes, held_out)
    line = f"{common} of {compared:,} held-out images compared have the codes of a training image"
    logger.info(f"WARNING: {line}" if common else f"Held-out data: {line}")


def overlap(codes: Any, held_out: Any) -> tuple[int, int]:
    """How many held-out images have, in their first view, exactly the codes of some view of a training image, and how
    many were compared. At most `COMPARED` of either side are, spread evenly."""
    known = {view.tobytes() for index in spread(len(codes), COMPARED) for view in _views(codes, index)}
    compared = spread(len(held_out), COMPARED)
    return sum(first_view(held_out, index).numpy().tobytes() in known for index in compared), len(compared)


def first_view(codes: CodeDataset | Text2ImgDatasetCode, index: int) -> Tensor:
    """Codes (N,) int64 of an image."""
    return codes.view(index, 0)[0] if isinstance(codes, CodeDataset) else codes.read_codes(index)


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, spread evenly over `length`."""
    return torch.linspace(0, length - 1, min(count, length)).round().long().tolist()


def _views(codes: CodeDataset | Text2ImgDatasetCode, index: int) -> Any:
    if isinstance(codes, CodeDataset):
        return codes.source.read(codes.indices[index], codes.vocab_size, codes.num_classes)[0][0]
    return [first_view(codes, index).numpy()]


def _source_hash(codes: Any) -> str | None:
    return getattr(getattr(codes, "source", None), "manifest", {}).get("source_sha256")
