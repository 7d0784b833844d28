"""Editing: draw chosen latent cells of an image anew, given the rest.

The GPT draws cells in raster order, row by row, and cell t knows the class and the cells before t, nothing else. So
with kept cells k and drawn cells d the result follows the product, over the drawn cells, of p(d_t | class, all cells
before t, kept or drawn). Kept cells are put in place while decoding, and every drawn cell sees the kept cells above
it and to its left in its row. It never sees the kept cells that come after it: what is drawn in the upper half of a
picture does not know the lower half. Two remedies, neither of them exact:

* `with_rest`: also draw every cell after the first chosen one, so that what follows fits what was drawn;
* `candidates`: draw several, and keep the one under which the kept cells that come after it are likeliest.

Sequences of cells are (B, N) with N = grid * grid; masks are (N,) or (B, N), True = draw anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.engine import Engine
from autoregressive.models.generate import Model, generate
from autoregressive.sample.masks import as_pixels
from autoregressive.sample.pipeline import image_generators
from tokenizer.coding import decode_codes, encode_images
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.seeding import mix_seed

OnToken = Callable[[int], None]


def edit_codes(
    gpt: Model,
    codes: Tensor,
    mask: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    *,
    candidates: int = 1,
    on_token: OnToken | None = None,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Draw the masked cells of codes (B, N) anew, as pictures of the classes `labels` (B,): int32 (B, N).

    Image i draws from a generator made of `seeds[i]`; every cell takes its own part of it, so a cell's draw does not
    depend on which others are masked, except through what it sees. An empty mask gives `codes`, a full one what
    `generate` gives with the same seeds. Cells after the last drawn one cost nothing. `out`, int32 (B, N), shows
    the candidate that is being drawn, as far as it is. `options` are those of `generate`.

    Raises:
        ValueError: when shapes, codes or labels do not fit the model or each other.
    """
    chosen = _chosen_cells(gpt, codes, mask)
    if candidates < 1:
        raise ValueError(f"there is at least one candidate, not {candidates}")
    codes = codes.to(torch.int32)
    count = last_drawn(chosen) + 1
    if count == 0:
        return codes.clone()
    if out is None:
        out = torch.empty_like(codes)
    given = codes.long().masked_fill(chosen, -1)[:, :count]
    best, best_score = codes, None
    for candidate in range(candidates):
        own = seeds if candidate == 0 else [mix_seed(seed, candidate) for seed in seeds]
        generators = image_generators(own, codes.device)
        out.copy_(codes)
        generate(
            gpt, labels, count, given=given, generators=generators, on_token=on_token, out=out[:, :count], **options
        )
        drawn = out.clone()
        if candidates == 1:
            return drawn
        score = fit_of_kept_cells(gpt, drawn, chosen, labels)
        if best_score is None:
            best, best_score = drawn, score
        better = score > best_score
        best, best_score = torch.where(better[:, None], drawn, best), torch.where(better, score, best_score)
    return best


@torch.no_grad()
def fit_of_kept_cells(gpt: Model, codes: Tensor, chosen: Tensor, labels: Tensor) -> Tensor:
    """How well kept cells follow what was drawn before them: sum of log p(kept cell | class, all before it), (B,).

    Kept cells before the first drawn one are the same under every candidate and make no difference.
    """
    model = gpt.model if isinstance(gpt, Engine) else gpt
    training = model.training
    logits, _ = model.eval()(codes[:, :-1].long(), labels)
    model.train(training)
    log_p = -F.cross_entropy(logits.transpose(1, 2), codes.long(), reduction="none")
    return log_p.masked_fill(chosen, 0).sum(dim=1)


def edit_images(
    gpt: Model,
    tokenizer: VQModel,
    images: Tensor,
    mask: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    *,
    paste: bool = False,
    **options: Any,
) -> Tensor:
    """`edit_codes` on images (B, 3, H, W) in [-1, 1] of the tokenizer's size: encode, edit, decode.

    The tokenizer's decoder changes pixels outside the mask too, a little. `paste` puts the original ones back there.
    `options` are those of `edit_codes`.
    """
    codes = encode_images(tokenizer, images)
    edited = decode_codes(tokenizer, edit_codes(gpt, codes, mask, labels, seeds, **options))
    return paste_outside(edited, images, mask) if paste else edited


def paste_outside(edited: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """`edited` (B, 3, H, W) inside the cells of `mask` (N,) or (B, N), `original` outside."""
    masks = mask.expand(len(edited), -1) if mask.ndim == 1 else mask
    stride = edited.shape[-1] // int(masks.shape[1] ** 0.5)
    inside = torch.stack([as_pixels(one, stride) for one in masks])[:, None]
    return torch.where(inside.to(edited.device), edited, original)


def _chosen_cells(gpt: Model, codes: Tensor, mask: Tensor) -> Tensor:
    """The mask as bool (B, N), on the codes' device."""
    if codes.ndim != 2 or codes.shape[1] != gpt.block_size:
        raise ValueError(f"expected codes (batch, {gpt.block_size}), as the GPT has it; got {tuple(codes.shape)}")
    if mask.dtype != torch.bool or mask.shape not in (codes.shape, codes.shape[1:]):
        raise ValueError(f"expected a bool mask {tuple(codes.shape[1:])}; got {mask.dtype} {tuple(mask.shape)}")
    if int(codes.min()) < 0 or int(codes.max()) >= gpt.vocab_size:
        raise ValueError(f"codes are 0 to {gpt.vocab_size - 1}; got {int(codes.min())} to {int(codes.max())}")
    return mask.to(codes.device).expand_as(codes)


def with_rest(mask: Tensor) -> Tensor:
    """The mask (..., N) with all cells after its first one."""
    return mask.cumsum(dim=-1) > 0


def last_drawn(mask: Tensor) -> int:
    """The last cell of a mask (N,), or of any image's in (B, N); -1 if there is none."""
    places = mask.reshape(-1, mask.shape[-1]).any(dim=0).nonzero()
    return int(places[-1]) if len(places) else -1
