"""Generation: prefill the condition, then decode one image token after another with a KV cache.

With guidance the batch is [conditional; unconditional]. The unconditional half is computed only while it is
used: the caches keep its rows, but after the last guided token the model runs on the conditional half alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.cache import DecodeCache
from autoregressive.models.engine import Engine
from autoregressive.models.gpt import Transformer
from autoregressive.models.guidance import (
    guidance_scales,
    guided_logits,
    null_rows_needed,
    uses_guidance,
    with_null_condition,
)
from autoregressive.models.sampling import (
    Generators,
    logits_to_probs,
    sample,
    temperatures,
    top_k_top_p_filtering,
)

OnToken = Callable[[int], None]
Caption = tuple[Tensor, Tensor]  # features (B, T, caption_dim) and mask (B, T), left padded
Model = Transformer | Engine


def prefill(
    model: Model,
    cond_idx: Tensor,
    input_pos: Tensor,
    cfg_scale: float,
    *,
    with_null: bool | None = None,
    cache: DecodeCache | None = None,
    **sampling_kwargs: Any,
) -> Tensor:
    """Draw the first token: int64 (B, 1).

    `cond_idx` is the condition, with guidance [condition; null condition] (2B, ...); `input_pos` are its
    positions. `with_null` says that the null half is there although this token is not guided (a later one
    is); default: it is if `cfg_scale` guides. Without `cache` the model uses those of `setup_caches`.
    """
    logits, _ = model(None, cond_idx, input_pos, cache=cache, last_only=True)
    if uses_guidance(cfg_scale) or with_null:
        logits = _guide(model)(logits, cfg_scale)
    return _sampler(model)(logits, **sampling_kwargs)[0]


def decode_one_token(
    model: Model,
    x: Tensor,
    input_pos: Tensor,
    cfg_scale: float,
    cfg_flag: bool,
    *,
    with_null: bool | None = None,
    cache: DecodeCache | None = None,
    **sampling_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Feed tokens `x` (B, 1) at `input_pos` (1,) and draw the next: int64 (B, 1), and probabilities (B, V).

    Guided if `cfg_scale` asks for it and `cfg_flag` is True. `with_null` computes the null half although this
    token is not guided, as a later one needs its keys and values; default: computed if it is used.
    """
    guided = uses_guidance(cfg_scale) and cfg_flag
    if guided or with_null:
        logits, _ = model(torch.cat([x, x]), None, input_pos, cache=cache)
        logits = _guide(model)(logits, cfg_scale if guided else 1.0)
    else:
        logits, _ = model(x, None, input_pos, cache=cache)
    return _sampler(model)(logits, **sampling_kwargs)


def decode_n_tokens(
    model: Model,
    cur_token: Tensor,
    input_pos: Tensor,
    num_new_tokens: int,
    cfg_scale: float,
    cfg_interval: float,
    *,
    scales: Sequence[float] | None = None,
    heat: Sequence[float] | None = None,
    given: Tensor | None = None,
    cache: DecodeCache | None = None,
    on_token: OnToken | None = None,
    out: Tensor | None = None,
    **sampling_kwargs: Any,
) -> Tensor:
    """Draw the tokens after `cur_token` (B, 1), which stands at `input_pos` (1,): int64 (B, new tokens), or
    `out` of that shape, which fills as they are drawn.

    `scales` and `heat` are the guidance scale and the temperature of each new token; default: `cfg_scale` and
    `cfg_interval`, and the temperature of `sampling_kwargs`. `given` (B, new tokens) are tokens that are put
    in place of the drawn ones, -1 where none is.
    """
    if scales is None:
        scales = guidance_scales(num_new_tokens + 1, cfg_scale, cfg_interval)[1:]
    null_steps = null_rows_needed(scales)
    tokens = cur_token.new_empty(cur_token.shape[0], num_new_tokens) if out is None else out
    for step in range(num_new_tokens):
        if heat is not None:
            sampling_kwargs["temperature"] = heat[step]
        with_null = step < null_steps
        cur_token, _ = decode_one_token(
            model, cur_token, input_pos, scales[step], with_null, with_null=with_null, cache=cache, **sampling_kwargs
        )
        if given is not None:
            cur_token = _put_in(given[:, step : step + 1], cur_token)
        tokens[:, step : step + 1] = cur_token
        input_pos = input_pos + 1
        if on_token is not None:
            on_token(step + 1)
    return tokens


def _put_in(given: Tensor, drawn: Tensor) -> Tensor:
    """`given` (B, 1), and `drawn` (B, 1) where it is -1."""
    return torch.where(given < 0, drawn, given.to(drawn.dtype))


@torch.no_grad()
def generate(
    model: Model,
    cond: Tensor,
    max_new_tokens: int,
    emb_masks: Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: float = -1,
    *,
    cfg_schedule: str = "constant",
    cfg_power: float = 1.0,
    cfg_start: int = 0,
    temperature: float = 1.0,
    temperature_end: float | None = None,
    temperature_schedule: str = "linear",
    negative: Caption | None = None,
    given: Tensor | None = None,
    generators: Generators | None = None,
    on_token: OnToken | None = None,
    out: Tensor | None = None,
    **sampling_kwargs: Any,
) -> Tensor:
    """Generate image tokens, int32 (B, max_new_tokens).

    Args:
        model: a GPT, or an engine that computes it faster.
        cond: class labels int64 (B,), or left-padded caption features (B, T, caption_dim), of which the
            first `cls_token_num` positions count.
        max_new_tokens: 1 to `block_size`.
        emb_masks: for captions (B, T), 1 on text and 0 on padding; default all text.
        cfg_scale: guidance scale; guidance is on above 1 and doubles the rows computed.
        cfg_interval: the last guided decode step, -1 for all. The first token is always guided.
        cfg_schedule, cfg_power, cfg_start: how the scale grows over the image, and the first guided token: see
            `guidance.guidance_scales`.
        temperature, temperature_end, temperature_schedule: from the first to the last of the image's tokens
            (`sampling.temperatures`); `temperature_end` None keeps `temperature` throughout.
        negative: for captions, what the images are led away from: features like `cond` and their mask like
            `emb_masks` (B or 1 rows), in place of the unconditional embedding under the caption's own mask.
        given: tokens that are put in place of the drawn ones, (B, max_new_tokens), -1 where none is. Later
            tokens see them. They take nothing from the randomness of the others.
        generators: one random generator per image; image i then depends on generators[i], not on the batch.
            Default: the global generator, one `torch.multinomial` over the batch per token.
        on_token: called after each token with its index, for a progress bar.
        out: int32 (B, max_new_tokens), filled as tokens are drawn, so that `on_token` can show what is there.
        sampling_kwargs: top_k, top_p, min_p, sample_logits of `sampling.sample`.

    The model computes in evaluation mode and is left as it was. ValueError for arguments that do not fit it.
    """
    _check(model, cond, max_new_tokens, emb_masks)
    _check_negative(model, negative, cond)
    _check_given(given, cond.shape[0], max_new_tokens, model.vocab_size)
    batch, prefix, decoded = cond.shape[0], model.cls_token_num, max_new_tokens - 1
    scales = guidance_scales(model.block_size, cfg_scale, cfg_interval, cfg_schedule, cfg_power, cfg_start)
    scales = scales[:max_new_tokens]
    heat = temperatures(model.block_size, temperature, temperature_end, temperature_schedule)
    if model.model_type == "t2i":
        cond = cond[:, :prefix].to(model.tok_embeddings.weight.dtype)
    with_null = null_rows_needed(scales) > 0
    if with_null:
        cond, emb_masks = _with_null_half(model, cond, emb_masks, negative)
    cache = _new_cache(model, cond, decoded, emb_masks)
    options = {"cache": cache, "generators": generators, **sampling_kwargs}
    positions = torch.arange(prefix + 1, device=cond.device)

    tokens = torch.empty(batch, max_new_tokens, dtype=torch.int32, device=cond.device) if out is None else out
    _check_out(tokens, batch, max_new_tokens)
    with _evaluating(model), decode_attention_backends(cond.device):
        first = prefill(model, cond, positions[:prefix], scales[0], with_null=with_null, temperature=heat[0], **options)
        if given is not None:
            first, options["given"] = _put_in(given[:, :1], first), given[:, 1:]
        tokens[:, :1] = first
        if on_token is not None:
            on_token(0)
        options.update(scales=scales[1:], heat=heat[1:], on_token=on_token, out=tokens[:, 1:])
        if isinstance(model, Engine) and model.decode_n_tokens is not None:
            model.decode_n_tokens(first, positions[prefix:], decoded, **options)
        else:
            decode_n_tokens(model, first, positions[prefix:], decoded, cfg_scale, cfg_interval, **options)
    return tokens


@contextmanager
def decode_attention_backends(device: torch.device) -> Iterator[None]:
    """Inside, attention on a GPU keeps away from cuDNN, which would plan anew for every number of keys.

    A plan takes a tenth of a second and more, and an image has hundreds of lengths.
    """
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def _with_null_half(
    model: Model, cond: Tensor, emb_masks: Tensor | None, negative: Caption | None
) -> tuple[Tensor, Tensor | None]:
    """The conditions and masks of [conditional; unconditional or negative] rows."""
    if negative is None:
        return with_null_condition(model, cond), None if emb_masks is None else emb_masks.repeat(2, 1)
    features, mask = negative
    if emb_masks is None:
        emb_masks = mask.new_ones(cond.shape[:2])
    features = features[:, : cond.shape[1]].to(cond.dtype).expand_as(cond)
    mask = mask[:, : emb_masks.shape[1]].expand_as(emb_masks)
    return torch.cat([cond, features]), torch.cat([emb_masks, mask.to(emb_masks.dtype)])


def _check_negative(model: Model, negative: Caption | None, cond: Tensor) -> None:
    if negative is None:
        return
    if model.model_type == "c2i":
        raise ValueError("a negative prompt is for captions; a class label has none")
    features, mask = negative
    fits = features.shape[1:] == cond.shape[1:] and mask.shape == features.shape[:2]
    if not fits or features.shape[0] not in (1, cond.shape[0]):
        raise ValueError(
            f"expected a negative prompt like the captions {tuple(cond.shape)}, with a mask, for one or all of them; "
            f"got {tuple(features.shape)} and {tuple(mask.shape)}"
        )


def _check_out(out: Tensor, batch: int, count: int) -> None:
    if out.shape != (batch, count) or out.dtype != torch.int32:
        raise ValueError(f"expected out int32 ({batch}, {count}); got {out.dtype} {tuple(out.shape)}")


def _check_given(given: Tensor | None, batch: int, count: int, vocab_size: int) -> None:
    if given is None:
        return
    if given.shape != (batch, count) or given.is_floating_point():
        raise ValueError(f"expected given tokens, integers ({batch}, {count}); got {given.dtype} {tuple(given.shape)}")
    if int(given.min()) < -1 or int(given.max()) >= vocab_size:
        raise ValueError(
            f"given tokens are -1 (none) to {vocab_size - 1}; got {int(given.min())} to {int(given.max())}"
        )


def _guide(model: Model) -> Callable[[Tensor, float], Tensor]:
    return model.guide if isinstance(model, Engine) else guided_logits


def _sampler(model: Model) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return model.sample if isinstance(model, Engine) else sample


def _check(model: Model, cond: Tensor, max_new_tokens: int, emb_masks: Tensor | None) -> None:
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


def _new_cache(model: Model, cond: Tensor, fed: int, emb_masks: Tensor | None) -> DecodeCache:
    """Caches for the condition and `fed` tokens: all but the last, which is drawn but never fed."""
    device, rows = cond.device, cond.shape[0]
    dtype = model.tok_embeddings.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    key_mask = None
    if emb_masks is not None:
        text = emb_masks[:, : model.cls_token_num].to(device=device, dtype=torch.bool)
        key_mask = torch.cat([text, text.new_ones(rows, fed)], dim=1)
    shape = (rows, model.cls_token_num + fed, dtype, device)
    if isinstance(model, Engine):
        return model.new_cache(*shape, key_mask)
    return DecodeCache.allocate(model.config, *shape, key_mask)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode inside, afterwards every module in the mode it had."""
    model = model.model if isinstance(model, Engine) else model
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
