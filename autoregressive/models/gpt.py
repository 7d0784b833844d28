"""The GPT over image tokens: a Llama-style transformer after a condition prefix (a class or a caption).

Position P - 1 + t predicts image token t, where P = `cls_token_num` positions hold the condition. The token
itself is put in at position P + t and carries the rotary embedding of its own cell. The model is pure: it
reads no files, takes no command-line arguments, knows no parallelism, and sampling leaves nothing behind in
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.cache import DecodeCache, KVCache
from autoregressive.models.condition import MLP, CaptionEmbedder, LabelEmbedder
from autoregressive.models.config import SIZES, ModelArgs, find_multiple, sized_args
from autoregressive.models.layers import Attention, FeedForward, RMSNorm, TransformerBlock
from autoregressive.models.loss import head_loss
from autoregressive.models.rope import (
    RotaryTable,
    apply_rotary_emb,
    precompute_freqs_cis,
    precompute_freqs_cis_2d,
)

CAPTION_POSITIONS = 120  # rows of the unconditional caption in every published checkpoint


class Transformer(nn.Module):
    """The model of a `ModelArgs`. ValueError if its fields do not fit together."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.vocab_size = config.vocab_size
        self.n_layer = config.n_layer
        self.block_size = config.block_size
        self.num_classes = config.num_classes
        self.model_type = config.model_type
        self.cls_token_num = config.cls_token_num

        self.cls_embedding = _condition_embedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout_p)
        rates = [config.drop_path_rate * i / max(config.n_layer - 1, 1) for i in range(config.n_layer)]
        self.layers = nn.ModuleList(TransformerBlock(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

        self.rotary = RotaryTable(config.grid_size, config.head_dim, config.rope_base, config.cls_token_num)
        self.rotary.on(self._device)
        self.max_batch_size = self.max_seq_length = -1
        self.causal_mask: Tensor | None = None
        self._own_cache: DecodeCache | None = None
        self.register_load_state_dict_pre_hook(_drop_foreign_keys)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Normal weights of deviation `initializer_range`; a zero head, so that the first loss is ln(V)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.output.weight)

    @property
    def freqs_cis(self) -> Tensor:
        """Rotary table: float32 (cls_token_num + block_size, head_dim / 2, 2), where the weights are."""
        return self.rotary.on(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def get_fsdp_wrap_module_list(self) -> list[nn.Module]:
        """The blocks: the units to shard, compile or checkpoint."""
        return list(self.layers)

    def setup_caches(self, max_batch_size: int, max_seq_length: int, dtype: torch.dtype) -> None:
        """Give the model caches of fixed shape, for code that decodes step by step through `forward` alone.

        They serve calls that leave out `idx` or `cond_idx` and bring no `cache`. Attention then reads all
        positions (`max_seq_length` rounded up to a multiple of 8) through `causal_mask` (rows, positions,
        positions), bool, which the caller may narrow. Neither is part of the module tree or the state dict.
        """
        rows, positions, device = max_batch_size, find_multiple(max_seq_length, 8), self._device
        self.max_batch_size, self.max_seq_length = rows, positions
        self._own_cache = DecodeCache.allocate(self.config, rows, positions, dtype, device)
        square = torch.ones(positions, positions, dtype=torch.bool, device=device)
        self.causal_mask = square.tril().repeat(rows, 1, 1)

    def forward(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        cache: DecodeCache | None = None,
        last_only: bool = False,
        loss_only: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Float32 logits (B, positions, V), and the loss if `targets` are given.

        `idx` int64 (B, n) are image tokens, `cond_idx` labels int64 (B,) or caption features (B, T,
        caption_dim) with T >= cls_token_num, cut to that. Both: a full forward over P + n positions;
        `cond_idx` alone: prefill; `idx` alone: decoding. `input_pos` int64 (positions,) says where they stand
        (default: 0, 1, ... or, with a `cache`, behind what it holds). `mask` is bool (B, 1, positions, keys),
        True = may attend; default causal.

        A full forward returns the n + 1 logits that predict image tokens, from position P - 1 on; in
        evaluation mode, with `input_pos` or `cache` and without `targets`, those of all positions.
        `last_only` keeps the last one.

        `targets` (B, N) gives the mean cross entropy; with `valid` (B,), 1 or 0, over the valid samples alone
        (0 if there is none). `loss_only` gives None in place of the logits, which are then never held all at once.
        """
        h = self._embed(idx, cond_idx)
        rows, count, _ = h.shape
        if cache is None and (idx is None or cond_idx is None):
            cache, mask = self._fixed_shape_cache(rows, input_pos, mask)
        elif cache is not None:
            narrowed = cache.extend(rows, count)
            mask = narrowed if mask is None else mask
            if input_pos is None:
                input_pos = torch.arange(cache.length - count, cache.length, device=h.device)

        table = self.rotary.on(h.device)
        freqs_cis = table[:count] if input_pos is None else table[input_pos]
        for i, layer in enumerate(self.layers):
            h = layer(h, freqs_cis, input_pos, mask, None if cache is None else cache.layers[i])

        if last_only:
            h = h[:, -1:]
        elif idx is not None and cond_idx is not None and self._predicts(input_pos, targets):
            h = h[:, self.cls_token_num - 1 :]
        if loss_only:
            return None, head_loss(self.norm(h), self.output.weight, targets, valid)
        logits = self.output(self.norm(h)).float()
        return logits, None if targets is None else _loss(logits, targets, valid)

    def _predicts(self, input_pos: Tensor | None, targets: Tensor | None) -> bool:
        """Whether a full forward is to return the logits of image tokens only."""
        return self.training or input_pos is None or targets is not None

    def _embed(self, idx: Tensor | None, cond_idx: Tensor | None) -> Tensor:
        """The input of the first block: prefix, tokens, or one after the other (B, positions, dim)."""
        parts = []
        if cond_idx is not None:
            parts.append(self.cls_embedding(self._cut_condition(cond_idx), train=self.training))
        if idx is not None:
            parts.append(self.tok_embeddings(idx))
        if not parts:
            raise ValueError("the model needs image tokens (idx), a condition (cond_idx), or both")
        h = torch.cat(parts, dim=1) if len(parts) == 2 else parts[0]
        if h.shape[1] > self.cls_token_num + self.block_size:
            raise ValueError(
                f"{h.shape[1]} positions are too many: the model has {self.cls_token_num} for the condition "
                f"and {self.block_size} for the image"
            )
        return self.tok_dropout(h)

    def _cut_condition(self, cond: Tensor) -> Tensor:
        """Captions cut to `cls_token_num` positions; labels as they are."""
        if self.model_type == "c2i":
            return cond
        if cond.ndim != 3 or cond.shape[1] < self.cls_token_num or cond.shape[2] != self.config.caption_dim:
            raise ValueError(
                f"expected caption features (batch, {self.cls_token_num}, {self.config.caption_dim}), "
                f"left-padded to cls_token_num positions; got {tuple(cond.shape)}"
            )
        return cond[:, : self.cls_token_num]

    def _fixed_shape_cache(
        self, rows: int, input_pos: Tensor | None, mask: Tensor | None
    ) -> tuple[DecodeCache, Tensor]:
        """The caches of `setup_caches`, and the mask of the positions at hand over all their positions."""
        if self._own_cache is None or self.causal_mask is None or input_pos is None:
            raise ValueError("prefill and decoding need cache=, or setup_caches() and input_pos=")
        return self._own_cache, self.causal_mask[:rows, None, input_pos] if mask is None else mask

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)
        self.rotary.on(self._device)  # so that a compiled forward finds the table made
        return self


def _condition_embedder(config: ModelArgs) -> LabelEmbedder | CaptionEmbedder:
    if config.model_type == "c2i":
        return LabelEmbedder(config.num_classes, config.dim, config.class_dropout_prob)
    rows = max(CAPTION_POSITIONS, config.cls_token_num)
    return CaptionEmbedder(config.caption_dim, config.dim, config.class_dropout_prob, rows)


def _loss(logits: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
    """Mean cross entropy over all targets (B, N), or over those of the samples with `valid` (B,) 1."""
    if valid is None:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    count = (valid.sum() * targets.shape[1]).clamp(min=1)  # on the device: max() would wait for it
    return (each * valid[:, None]).sum() / count


def _drop_foreign_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Some checkpoints carry the rotary table or the caches of a generation: neither is part of the model."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        if key == f"{prefix}freqs_cis" or ".attention.kv_cache." in key:
            del state_dict[key]


def size_factories(model_class: Callable[[ModelArgs], Any]) -> dict[str, Callable[..., Any]]:
    """One function per named size, which takes the other `ModelArgs` fields as keywords."""

    def factory(size: str) -> Callable[..., Any]:
        def build(**fields: Any) -> Any:
            return model_class(sized_args(size, **fields))

        build.__name__ = build.__qualname__ = size.replace("-", "_")
        build.__doc__ = f"A {size}; `fields` are those of `ModelArgs` but n_layer, n_head and dim."
        return build

    return {size: factory(size) for size in SIZES}


GPT_models: dict[str, Callable[..., Transformer]] = size_factories(Transformer)
GPT_XS, GPT_S = GPT_models["GPT-XS"], GPT_models["GPT-S"]
GPT_B, GPT_L, GPT_XL = GPT_models["GPT-B"], GPT_models["GPT-L"], GPT_models["GPT-XL"]
GPT_XXL, GPT_XXXL = GPT_models["GPT-XXL"], GPT_models["GPT-XXXL"]
GPT_1B, GPT_3B, GPT_7B = GPT_models["GPT-1B"], GPT_models["GPT-3B"], GPT_models["GPT-7B"]

__all__ = [
    "GPT_1B",
    "GPT_3B",
    "GPT_7B",
    "GPT_B",
    "GPT_L",
    "GPT_S",
    "GPT_XL",
    "GPT_XS",
    "GPT_XXL",
    "GPT_XXXL",
    "MLP",
    "Attention",
    "CaptionEmbedder",
    "FeedForward",
    "GPT_models",
    "KVCache",
    "LabelEmbedder",
    "ModelArgs",
    "RMSNorm",
    "Transformer",
    "TransformerBlock",
    "apply_rotary_emb",
    "find_multiple",
    "precompute_freqs_cis",
    "precompute_freqs_cis_2d",
    "size_factories",
]
