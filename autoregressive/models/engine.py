"""How a model computes while it generates: the interface that `generate` drives, and its plain implementation.

An engine stands in for the model: `generate(engine, ...)`. Faster ones (package `autoregressive.engine`) override how
logits are computed, how tokens are drawn, or the whole loop. What they must keep: the same tokens as the plain engine
for the same logits, and image i independent of the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.cache import DecodeCache
from autoregressive.models.gpt import Transformer
from autoregressive.models.guidance import guided_logits
from autoregressive.models.sampling import sample


class Engine:
    """Calls the model as it is. Its caches are allocated once and serve every later generation that fits in them.

    Attributes that it does not have are the model's, so code that samples need not know which of both it holds.
    """

    name = "eager"
    compile_seconds = 0.0  # that making this engine took
    decode_n_tokens: Callable[..., Tensor] | None = None  # the whole loop, where an engine has its own

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._cache: DecodeCache | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: while unpickling or copying
            raise AttributeError(name)
        return getattr(self.model, name)

    def warm_up(self, images: int = 1, **options: Any) -> None:
        """Do what would otherwise slow down the first generation of `images` with `options` of `generate`."""

    def new_cache(
        self, rows: int, positions: int, dtype: torch.dtype, device: torch.device, key_mask: Tensor | None
    ) -> DecodeCache:
        """Empty caches for at least `rows` sequences of `positions`; those of earlier calls are no longer valid.

        `key_mask` is bool (rows, positions), False where a caption is padded, or None.
        """
        if self._cache is None or not self._cache.fits(rows, positions, dtype, device):
            self._cache = None  # frees the old ones before the new ones are made
            self._cache = DecodeCache.allocate(self.model.config, rows, positions, dtype, device)
        self._cache.length, self._cache.key_mask = 0, key_mask
        return self._cache

    def __call__(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor,
        *,
        cache: Any,
        last_only: bool = False,
    ) -> tuple[Tensor, None]:
        """Logits float32 (B, S, V), like `Transformer.forward` with a cache: of a condition, or of one token each."""
        logits, _ = self.model(idx, cond_idx, input_pos, cache=cache, last_only=last_only)
        return logits, None

    def guide(self, logits: Tensor, cfg_scale: float) -> Tensor:
        """Guided logits (B, S, V) from those of [cond; uncond] (2B, S, V)."""
        return guided_logits(logits, cfg_scale)

    def sample(self, logits: Tensor, **sampling: Any) -> tuple[Tensor, Tensor | None]:
        """Tokens int64 (B, 1) drawn from the last of `logits` (B, S, V); the options are `sampling.sample`'s."""
        return sample(logits, **sampling)
