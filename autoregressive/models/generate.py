"""Generation: prefill the condition, then decode one image token after another with a KV cache.

With guidance the batch is [conditional; unconditional]. The unconditional half is computed only while it is
used: the caches keep its rows, but once `cfg_interval` has passed the model runs on the conditional half
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoregressive.models.cache import DecodeCache
from autoregressive.models.gpt import Transformer
from autoregressive.models.guidance import guided_at, guided_logits, uses_guidance, with_null_condition
from autoregressive.models.sampling import Generators, logits_to_probs, sample, top_k_top_p_filtering

OnToken = Callable[[int], None]


def prefill(
    model: Transformer,
    cond_idx: Tensor,
    input_pos: Tensor,
    cfg_scale: float,
    *,
    cache: DecodeCache | None = None,
    **sampling_kwargs: Any,
) -> Tensor:
    """Draw the first token: int64 (B, 1).

    `cond_idx` is the condition, with guidance [condition; null condition] (2B, ...); `input_pos` are its
    positions. Without `cache` the model uses those of `setup_caches`.
    """
    logits, _ = model(None, cond_idx, input_pos, cache=cache, last_only=True)
    if uses_guidance(cfg_scale):
        logits = guided_logits(logits, cfg_scale)
    return sample(logits, **sampling_kwargs)[0]


def decode_one_token(
    model: Transformer,
    x: Tensor,
    input_pos: Tensor,
    cfg_scale: float,
    cfg_flag: bool,
    *,
    cache: DecodeCache | None = None,
    **sampling_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Feed tokens `x` (B, 1) at `input_pos` (1,) and draw the next: int64 (B, 1), and probabilities (B, V).

    Guided if `cfg_scale` asks for it and `cfg_flag` is True.
    """
    if uses_guidance(cfg_scale) and cfg_flag:
        logits, _ = model(torch.cat([x, x]), None, input_pos, cache=cache)
        logits = guided_logits(logits, cfg_scale)
    else:
        logits, _ = model(x, None, input_pos, cache=cache)
    return sample(logits, **sampling_kwargs)


def decode_n_tokens(
    model: Transformer,
    cur_token: Tensor,
    input_pos: Tensor,
    num_new_tokens: int,
    cfg_scale: float,
    cfg_interval: float,
    *,
    cache: DecodeCache | None = None,
    on_token: OnToken | None = None,
    **sampling_kwargs: Any,
) -> Tensor:
    """Draw the tokens after `cur_token` (B, 1), which stands at `input_pos` (1,): int64 (B, new tokens)."""
    tokens = cur_token.new_empty(cur_token.shape[0], num_new_tokens)
    for step in range(num_new_tokens):
        guided = guided_at(step, cfg_interval)
        cur_token, _ = decode_one_token(model, cur_token, input_pos, cfg_scale, guided, cache=cache, **sampling_kwargs)
        tokens[:, step : step + 1] = cur_token
        input_pos = input_pos + 1
        if on_token is not None:
            on_token(step + 1)
    return tokens


@torch.no_grad()
def generate(
    model: Transformer,
    cond: Tensor,
    max_new_tokens: int,
    emb_masks: Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: float = -1,
    *,
    generators: Generators | None = None,
    on_token: OnToken | None = None,
    **sampling_kwargs: Any,
) -> Tensor:
    """Generate image tokens, int32 (B, max_new_tokens).

    Args:
        cond: class labels int64 (B,), or left-padded caption features (B, T, caption_dim), of which the
            first `cls_token_num` positions count.
        max_new_tokens: 1 to `block_size`.
        emb_masks: for captions (B, T), 1 on text and 0 on padding; default all text.
        cfg_scale: guidance scale; guidance is on above 1 and doubles the rows computed.
        cfg_interval: the last guided decode step, -1 for all. The first token is always guided.
        generators: one random generator per image; image i then depends on generators[i], not on the batch.
            Default: the global generator, one `torch.multinomial` over the batch per token.
        on_token: called after each token with its index, for a progress bar.
        sampling_kwargs: temperature, top_k, top_p, sample_logits of `sampling.sample`.

    The model computes in evaluation mode and is left as it was. ValueError for arguments that do not fit it.
    """
    _check(model, cond, max_new_tokens, emb_masks)
    batch, prefix, decoded = cond.shape[0], model.cls_token_num, max_new_tokens - 1
    if model.model_type == "t2i":
        cond = cond[:, :prefix].to(model.tok_embeddings.weight.dtype)
    if uses_guidance(cfg_scale):
        cond = with_null_condition(model, cond)
    cache = _new_cache(model, cond, decoded, emb_masks)
    options = {"cache": cache, "generators": generators, **sampling_kwargs}
    positions = torch.arange(prefix + 1, device=cond.device)

    tokens = torch.empty(batch, max_new_tokens, dtype=torch.int32, device=cond.device)
    with _evaluating(model):
        first = prefill(model, cond, positions[:prefix], cfg_scale, **options)
        tokens[:, :1] = first
        if on_token is not None:
            on_token(0)
        tokens[:, 1:] = decode_n_tokens(
            model, first, positions[prefix:], decoded, cfg_scale, cfg_interval, on_token=on_token, **options
        )
    return tokens


def _check(model: Transformer, cond: Tensor, max_new_tokens: int, emb_masks: Tensor | None) -> None:
    if not 1 <= max_new_tokens <= model.block_size:
        raise ValueError(f"max_new_tokens is 1 to {model.block_size} (block_size), not {max_new_tokens}")
    if model.model_type == "c2i":
        _check_labels(cond, model.cls_embedding.embedding_table.num_embeddings, emb_masks)
    elif emb_masks is not None and emb_masks.shape != cond.shape[:2]:
        raise ValueError(f"emb_masks {tuple(emb_masks.shape)} do not fit the captions {tuple(cond.shape)}")


def _check_labels(labels: Tensor, rows: int, emb_masks: Tensor | None) -> None:
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"expected class labels, int64 (batch,); got {labels.dtype} {tuple(labels.shape)}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < rows:
        raise ValueError(f"class labels are 0 to {rows - 1}; got {int(labels.min())} to {int(labels.max())}")
    if emb_masks is not None:
        raise ValueError("emb_masks are for captions; a class label has none")


def _new_cache(model: Transformer, cond: Tensor, fed: int, emb_masks: Tensor | None) -> DecodeCache:
    """Caches for the condition and `fed` tokens: all but the last, which is drawn but never fed."""
    device, rows = cond.device, cond.shape[0]
    dtype = model.tok_embeddings.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    key_mask = None
    if emb_masks is not None:
        text = emb_masks[:, : model.cls_token_num].to(device=device, dtype=torch.bool)
        text = text.repeat(rows // text.shape[0], 1)  # the unconditional half is masked like the captions
        key_mask = torch.cat([text, text.new_ones(rows, fed)], dim=1)
    return DecodeCache.allocate(model.config, rows, model.cls_token_num + fed, dtype, device, key_mask)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, afterwards every module in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


__all__ = [
    "decode_n_tokens",
    "decode_one_token",
    "generate",
    "logits_to_probs",
    "prefill",
    "sample",
    "top_k_top_p_filtering",
]
