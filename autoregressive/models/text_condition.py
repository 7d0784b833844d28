"""Captions as a condition: the text stands at the right end of its positions, directly before the image."""

from __future__ import annotations

import torch
from torch import Tensor


def left_pad_text(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Turn right-padded text features (B, T, C) with mask (B, T), 1 on text, into left-padded ones.

    Returns features whose padding is exactly zero, and their mask. ValueError if `mask` is not 1...1 0...0
    per row.
    """
    if features.shape[:2] != mask.shape:
        raise ValueError(f"expected (B, T, C) and (B, T), got {tuple(features.shape)} and {tuple(mask.shape)}")
    lengths = mask.bool().sum(dim=1, keepdim=True)
    positions = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask.bool(), positions < lengths):
        raise ValueError("expected right-padded text: every row of the mask is ones followed by zeros")
    source = (positions + lengths) % mask.shape[1]
    left_mask = mask.gather(1, source)
    rolled = features.gather(1, source[..., None].expand_as(features))
    return rolled.masked_fill(~left_mask.bool()[..., None], 0), left_mask


def text_attention_mask(key_mask: Tensor, first_query: int = 0) -> Tensor:
    """Who may attend to whom, given which keys are text or image (True) and which are padding (False).

    `key_mask` is bool (B, L). The result is bool (B, 1, L - first_query, L): query i sees key j if j <= i and
    j is not padding, or if i = j, so that a padded position still has something finite to attend to.
    """
    keys = torch.arange(key_mask.shape[1], device=key_mask.device)
    queries = keys[first_query:, None]
    return ((keys <= queries) & key_mask[:, None, None]) | (keys == queries)
