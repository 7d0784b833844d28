"""The blocks of the GPT: pre-norm attention and gated feed-forward, no bias anywhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.cache import KVCache
from autoregressive.models.config import ModelArgs
from autoregressive.models.rope import apply_rotary_emb
from utils.drop_path import DropPath


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast back to the dtype of x, then times the weight."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.dim, bias=False)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


def aligned_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention` with the width of the heads filled up with zeros to a multiple of 8.

    Zeros change neither scores nor results, whose scale stays that of the true width. cuDNN, whose kernels are the
    fastest on Hopper, takes no other widths. FlashAttention would be given padded copies by torch, and with a mask
    other widths take the path without a fused kernel. Compiled, the zeros are written along with the rotated values.

    Args:
        q: (B, heads, S, head_dim); k and v: (B, heads or fewer, keys, head_dim).
        options: `attn_mask`, `dropout_p`, `is_causal` and `enable_gqa`.

    Returns:
        (B, heads, S, head_dim).
    """
    width = q.shape[-1]
    if width % 8 == 0:
        return F.scaled_dot_product_attention(q, k, v, **options)
    q, k, v = (F.pad(heads, (0, -width % 8)) for heads in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5, **options)[..., :width]


class Attention(nn.Module):
    """Multi-head attention with rotary positions; consecutive query heads may share one key/value head.

    The rows of `wqkv` are the query heads, then the key heads, then the value heads.
    """

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.dim = config.dim
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.dim, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.attn_dropout_p = config.attn_dropout_p
        self.resid_dropout = nn.Dropout(config.resid_dropout_p)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        input_pos: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, dim) to (B, S, dim).

        `freqs_cis` holds the rotary rows of the S positions. With a `cache`, the new keys and values are
        stored at `input_pos` (S,) and attention reads the cached ones. `mask` is bool, True = may attend,
        broadcastable to (B, heads, S, keys); without it several positions attend causally and a single one to
        everything.
        """
        q, k, v = self._project(x, freqs_cis)
        if cache is not None:
            k, v = cache.update(input_pos, k, v)
        attend = aligned_attention if q.is_cuda else F.scaled_dot_product_attention
        out = attend(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            attn_mask=mask,
            dropout_p=self.attn_dropout_p if self.training else 0.0,
            is_causal=mask is None and x.shape[1] > 1,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))

    def _project(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, n_head, S, head_dim) and keys, and values, (B, n_kv_head, S, head_dim)."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        # split, not slices: the gradient of a split is put together once, that of slices is a sum of padded parts
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); `drop_path` is the stochastic depth of both."""

    def __init__(self, config: ModelArgs, drop_path: float) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        input_pos: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, dim) to (B, S, dim); the other arguments are those of `Attention.forward`."""
        h = x + self.drop_path(self.attention(self.attention_norm(x), freqs_cis, input_pos, mask, cache))
        return h + self.drop_path(self.feed_forward(self.ffn_norm(h)))
