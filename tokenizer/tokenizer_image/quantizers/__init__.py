"""The family of quantizers, by the names of the flag --quantizer. Each is in a file of its own, its paper named there.

All give ``(quant, losses, (None, None, indices))`` and know the codes of indices; the tokenizer around them is the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizer.tokenizer_image.quantizers.base import Quantizer
from tokenizer.tokenizer_image.quantizers.ema import EMAQuantizer
from tokenizer.tokenizer_image.quantizers.fsq import FSQ, LEVELS
from tokenizer.tokenizer_image.quantizers.ibq import IBQ
from tokenizer.tokenizer_image.quantizers.lfq import LFQ, lfq_width
from tokenizer.tokenizer_image.quantizers.vq import VectorQuantizer

QUANTIZERS: Mapping[str, type[Quantizer]] = {
    "vq": VectorQuantizer, "ema": EMAQuantizer, "fsq": FSQ, "lfq": LFQ, "ibq": IBQ,
}  # fmt: skip


def code_shape(kind: str, size: int, width: int, levels: Sequence[int] | None = None) -> tuple[int, int]:
    """Codes K and channels D that a quantizer of this kind really has, when `size` and `width` were asked for.

    Raises:
        ValueError: no such kind, or none of this size.
    """
    if kind not in QUANTIZERS:
        raise ValueError(f"The quantizer must be one of {list(QUANTIZERS)}, but is {kind!r}.")
    if kind == "fsq":
        levels = fsq_levels(size, levels)
        return FSQ(levels, show_usage=False).n_e, len(levels)
    return (size, lfq_width(size)) if kind == "lfq" else (size, width)


def fsq_levels(size: int, levels: Sequence[int] | None = None) -> Sequence[int]:
    """The levels given, or those that are known to work for `size` codes."""
    if levels:
        return levels
    if size not in LEVELS:
        known = ", ".join(f"{codes} ({' '.join(map(str, known))})" for codes, known in LEVELS.items())
        raise ValueError(
            f"FSQ has no known levels for {size} codes: give --fsq-levels, whose product is the number of codes, or "
            f"a --codebook-size of {known}."
        )
    return LEVELS[size]


def new_quantizer(
    kind: str,
    size: int,
    width: int,
    *,
    beta: float,
    entropy_loss_ratio: float,
    l2_norm: bool,
    show_usage: bool,
    levels: Sequence[int] | None = None,
) -> Quantizer:
    """An untrained quantizer of K = `size` codes of D = `width` channels; a kind takes of the rest what it knows."""
    if kind == "vq":
        return VectorQuantizer(size, width, beta, entropy_loss_ratio, l2_norm, show_usage)
    if kind == "ema":
        return EMAQuantizer(size, width, beta, show_usage)
    if kind == "fsq":
        return FSQ(fsq_levels(size, levels), show_usage)
    if kind == "lfq":
        return LFQ(size, beta, entropy_loss_ratio, show_usage)
    return IBQ(size, width, beta, entropy_loss_ratio, show_usage)


def kind_of(keys: Sequence[str]) -> str | None:
    """The kind of quantizer whose state dict has these keys; None when they are of none."""
    kinds = [kind for kind, cls in QUANTIZERS.items() if cls.mark in keys]
    return max(kinds, key=lambda kind: kind != "vq", default=None)  # others may have vq's key beside their own
