"""Decoding by a few fused Triton kernels a layer, on top of the fixed shapes and recorded steps of `static`.

A step of up to 64 rows is bound by reading weights and caches, and by the number of kernels. Here a block is five:
norm + qkv; rotation, cache and attention; output + residual; norm + gated feed-forward; output + residual. One more
samples the token. The length of the cache is read on the device, so one graph serves all positions. More rows than
that are bound by the matrix products, which cuBLAS then computes.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.engine.kernels.attention import decode_attention
from autoregressive.engine.kernels.linear import linear, rms_norm, silu_mul, swiglu
from autoregressive.engine.kernels.sampler import advance, sample_tokens
from autoregressive.engine.static import DecodeBuffers, GraphKey, StaticEngine
from autoregressive.engine.weight_only import Int8Linear
from autoregressive.models.cache import DecodeCache, FixedCache
from autoregressive.models.gpt import Transformer
from autoregressive.models.layers import FeedForward, RMSNorm, TransformerBlock

SKINNY_ROWS = 64  # up to here a product is bound by reading its weights


def unsupported(model: Transformer) -> str | None:
    """Why the fused kernels cannot compute this model; None if they can."""
    weight = model.tok_embeddings.weight
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if weight.device.type != "cuda" and not interpreted:
        return f"Triton kernels run on a GPU, the model is on {weight.device}"
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the kernels are for GPUs of compute capability 8.0 (Ampere) and later"
    if model.config.dim % 8 or model.config.ffn_hidden % 8:
        return f"the widths {model.config.dim} and {model.config.ffn_hidden} are not both multiples of 8"
    return None


class FusedEngine(StaticEngine):
    """The engine of NVIDIA GPUs. Up to 32 guided images, an image does not depend on its batch, to the last bit.

    Raises:
        ValueError: a model that the kernels cannot compute.
    """

    name = "triton"

    def __init__(self, model: Transformer, quantize: str = "none") -> None:
        if reason := unsupported(model):
            raise ValueError(f"the triton engine cannot compute this model: {reason}")
        super().__init__(model, quantize, compile_blocks=False)

    def new_cache(
        self, rows: int, positions: int, dtype: torch.dtype, device: torch.device, key_mask: Tensor | None
    ) -> DecodeCache:
        """As `StaticEngine.new_cache`. ValueError if a caption is padded anywhere but in front."""
        if key_mask is not None and bool((key_mask[:, 1:] < key_mask[:, :-1]).any()):
            raise ValueError("the triton engine needs captions that are padded on the left; use --engine compiled")
        return super().new_cache(rows, positions, dtype, device, key_mask)

    def _keys(self, filled: int) -> int:
        """All of them: the kernel reads the filled length itself."""
        return self.positions

    def advance(self, key: GraphKey, buffers: DecodeBuffers, cache: FixedCache) -> None:
        """One step: feed buffers.x, sample, write down, move on. Only tensors change."""
        logits = self._logits(key, buffers, cache)
        options = dict(key.sampling)
        greedy = not options.pop("sample_logits", True)
        sample_tokens(
            logits, buffers.scales, buffers.temperatures, buffers.index, buffers.seeds, buffers.noise_from,
            buffers.forced_tokens, buffers.tokens, buffers.x, with_uncond=key.with_uncond, greedy=greedy, **options,
        )  # fmt: skip
        advance(buffers.position, buffers.index)

    def _logits(self, key: GraphKey, buffers: DecodeBuffers, cache: FixedCache) -> Tensor:
        """Logits (rows, V) of the tokens to feed, in the model's format."""
        model = self.model
        h = model.tok_embeddings(buffers.x[:, 0])
        if key.with_uncond:
            h = torch.cat([h, h])
        first_key = buffers.first_key[: len(h)] if key.masked else None
        for block, kv in zip(model.layers, cache.layers):
            h = _attend(h, block, model.freqs_cis, buffers.position, kv.k_cache, kv.v_cache, first_key)
            h = _feed_forward(h, block.feed_forward, block.ffn_norm)
        return _product(h, model.output, norm=model.norm)


def _attend(
    h: Tensor,
    block: TransformerBlock,
    rope_table: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    first_key: Tensor | None,
) -> Tensor:
    """h (rows, dim) + attention(norm(h)), with the new keys and values stored at `position`."""
    attention = block.attention
    qkv = _product(h, attention.wqkv, norm=block.attention_norm)
    out = decode_attention(qkv, rope_table, position, k_cache, v_cache, n_head=attention.n_head, first_key=first_key)
    return _product(out, attention.wo, residual=h)


def _feed_forward(h: Tensor, layer: FeedForward, norm: RMSNorm) -> Tensor:
    """h (rows, dim) + feed_forward(norm(h))."""
    if len(h) <= SKINNY_ROWS:
        scales = {"scale1": _scale(layer.w1), "scale3": _scale(layer.w3)}
        inner = swiglu(h, layer.w1.weight, layer.w3.weight, norm_weight=norm.weight, eps=norm.eps, **scales)
    else:
        x = rms_norm(h, norm.weight, norm.eps)
        inner = silu_mul(layer.w1(x), layer.w3(x))
    return _product(inner, layer.w2, residual=h)


def _product(
    x: Tensor, layer: nn.Linear | Int8Linear, *, norm: RMSNorm | None = None, residual: Tensor | None = None
) -> Tensor:
    """layer(norm(x)) + residual, (rows, outputs)."""
    if len(x) <= SKINNY_ROWS:
        options = {} if norm is None else {"norm_weight": norm.weight, "eps": norm.eps}
        return linear(x, layer.weight, residual=residual, scale=_scale(layer), **options)
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps)
    if residual is not None and isinstance(layer, nn.Linear):
        return torch.addmm(residual, x, layer.weight.t())
    out = F.linear(x, layer.weight) if isinstance(layer, nn.Linear) else layer(x)
    return out if residual is None else out + residual


def _scale(layer: nn.Linear | Int8Linear) -> Tensor | None:
    return layer.scale if isinstance(layer, Int8Linear) else None
