"""Decoding by a few fused Triton kernels a layer, on top of the fixed shapes and recorded steps of `static`.

A step of up to 64 rows is bound by reading weights and caches, and by the number of kernels. Here a block is five:
norm + qkv; rotation, cache and attention; output + residual; norm + gated feed-forward; output + residual. One more
samples the token. The length of the cache is read on the device, so one graph serves all positions. More rows than
that are bound by the matrix products, which cuBLAS then computes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.engine.kernels.attention import decode_attention
from autoregressive.engine.kernels.linear import MAX_ROWS, Stream, add_linear, embed, linear, rms_norm, silu_mul, swiglu
from autoregressive.engine.kernels.sampler import advance, sample_tokens
from autoregressive.engine.static import DecodeBuffers, GraphKey, StaticEngine
from autoregressive.engine.weight_only import Int8Linear
from autoregressive.models.cache import EIGHT_BITS, DecodeCache, FixedCache, KVCache
from autoregressive.models.gpt import Transformer
from autoregressive.models.layers import RMSNorm


def unsupported(model: Transformer, kv_cache_dtype: str = "auto") -> str | None:
    """Why the fused kernels cannot compute this model with such caches; None if they can."""
    weight = model.tok_embeddings.weight
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if weight.device.type != "cuda" and not interpreted:
        return f"Triton kernels run on a GPU, the model is on {weight.device}"
    if weight.device.type == "cuda":
        capability = torch.cuda.get_device_capability(weight.device)
        if capability < (8, 0):
            return "the kernels are for GPUs of compute capability 8.0 (Ampere) and later"
        if kv_cache_dtype == "fp8" and capability < (8, 9):
            return "fp8 caches are for GPUs of compute capability 8.9 (Ada) and later; int8 caches are for all"
    if model.config.dim % 8 or model.config.ffn_hidden % 8:
        return f"the widths {model.config.dim} and {model.config.ffn_hidden} are not both multiples of 8"
    return None


class FusedEngine(StaticEngine):
    """The engine of NVIDIA GPUs.

    Up to 32 guided images of classes, every row is summed in one order, so that an image does not depend on its batch,
    to the last bit. Captions are read by cuBLAS, whose roundings may depend on their number.

    `kv_cache_dtype` "int8" or "fp8" holds keys and values in 8 bits, "auto" in the model's format.

    Raises:
        ValueError: a model that the kernels cannot compute, or caches that the GPU has no numbers for.
    """

    name = "triton"

    def __init__(self, model: Transformer, quantize: str = "none", kv_cache_dtype: str = "auto") -> None:
        if reason := unsupported(model, kv_cache_dtype):
            raise ValueError(f"the triton engine cannot compute this model: {reason}")
        super().__init__(model, quantize, compile_blocks=False)
        self.kv_cache_dtype = kv_cache_dtype

    def new_cache(
        self, rows: int, positions: int, dtype: torch.dtype, device: torch.device, key_mask: Tensor | None
    ) -> DecodeCache:
        """As `StaticEngine.new_cache`. ValueError if a caption is padded anywhere but in front."""
        if key_mask is not None and bool((key_mask[:, 1:] < key_mask[:, :-1]).any()):
            raise ValueError("the triton engine needs captions that are padded on the left; use --engine compiled")
        return super().new_cache(rows, positions, EIGHT_BITS.get(self.kv_cache_dtype, dtype), device, key_mask)

    def __call__(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor,
        *,
        cache: DecodeCache,
        last_only: bool = False,
    ) -> tuple[Tensor, None]:
        """As `Engine.__call__`. A class is one position, which the kernels of a decode step compute.

        Not with caches in 8 bits: a condition attends to itself as it was before rounding.
        """
        few = self.model.model_type == "c2i" and idx is None and len(cond_idx) <= MAX_ROWS  # type: ignore[arg-type]
        if not few or self.kv_cache_dtype != "auto":
            return super().__call__(idx, cond_idx, input_pos, cache=cache, last_only=last_only)
        cache.extend(len(cond_idx), 1)  # type: ignore[arg-type]
        classes = self.model.cls_embedding.embedding_table.weight
        logits = _Step(self.model, classes, cond_idx, input_pos, None, cache).skinny()  # type: ignore[arg-type]
        return logits[:, None].float(), None

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
        rows = key.images * (2 if key.with_uncond else 1)
        first_key = buffers.first_key[:rows] if key.masked else None
        table = self.model.tok_embeddings.weight
        step = _Step(self.model, table, buffers.x[:, 0], buffers.position, first_key, cache)
        return step.skinny(rows // key.images) if rows <= MAX_ROWS else step.wide(rows // key.images)


@dataclass(frozen=True)
class _Step:
    """One decode step of `tokens` int64 (B,), which are rows of `table`, at `position` int64 (1,).

    The results are logits (copies * B, V): of all tokens, and again of all tokens for the unconditional rows.
    """

    model: Transformer
    table: Tensor
    tokens: Tensor
    position: Tensor
    first_key: Tensor | None
    cache: DecodeCache

    def skinny(self, copies: int = 1) -> Tensor:
        """By the kernels that read each matrix once: for few rows, whose time is that of reading."""
        blocks = list(self.model.layers)
        norms = [*(block.attention_norm for block in blocks), self.model.norm]
        stream = embed(self.tokens, self.table, norms[0].weight, copies)
        for block, kv, norm, next_norm in zip(blocks, self.cache.layers, norms, norms[1:]):
            attention, gated = block.attention, block.feed_forward
            qkv = linear(stream, attention.wqkv.weight, eps=norm.eps, scale=_scale(attention.wqkv))
            mixed = self.attend(qkv, kv, attention.n_head)
            stream = _add(mixed, attention.wo, stream, block.ffn_norm)
            scales = {"scale1": _scale(gated.w1), "scale3": _scale(gated.w3)}
            inner = swiglu(stream, gated.w1.weight, gated.w3.weight, eps=block.ffn_norm.eps, **scales)
            stream = _add(inner, gated.w2, stream, next_norm)
        head = self.model.output
        return linear(stream, head.weight, eps=self.model.norm.eps, scale=_scale(head))

    def wide(self, copies: int = 1) -> Tensor:
        """By the products of cuBLAS: for many rows, whose time is that of multiplying."""
        h = F.embedding(self.tokens, self.table).repeat(copies, 1)
        for block, kv in zip(self.model.layers, self.cache.layers):
            attention, gated = block.attention, block.feed_forward
            qkv = attention.wqkv(_normed(h, block.attention_norm))
            h = _plus(h, self.attend(qkv, kv, attention.n_head), attention.wo)
            x = _normed(h, block.ffn_norm)
            h = _plus(h, silu_mul(gated.w1(x), gated.w3(x)), gated.w2)
        return self.model.output(_normed(h, self.model.norm))

    def attend(self, qkv: Tensor, kv: KVCache, n_head: int) -> Tensor:
        """Attention (rows, dim) of qkv (rows, heads), whose keys and values are stored at the position."""
        return decode_attention(
            qkv, self.model.freqs_cis, self.position, kv.k_cache, kv.v_cache, n_head=n_head, first_key=self.first_key,
            **kv.scales,
        )  # fmt: skip


def _add(x: Tensor, layer: nn.Linear | Int8Linear, stream: Stream, next_norm: RMSNorm) -> Stream:
    return add_linear(x, layer.weight, stream.h, next_norm.weight, scale=_scale(layer))


def _plus(h: Tensor, x: Tensor, layer: nn.Linear | Int8Linear) -> Tensor:
    """h + layer(x), added by cuBLAS itself where the weights are not int8."""
    return h + layer(x) if isinstance(layer, Int8Linear) else torch.addmm(h, x, layer.weight.t())


def _normed(h: Tensor, norm: RMSNorm) -> Tensor:
    return rms_norm(h, norm.weight, norm.eps)


def _scale(layer: nn.Linear | Int8Linear) -> Tensor | None:
    return layer.scale if isinstance(layer, Int8Linear) else None
