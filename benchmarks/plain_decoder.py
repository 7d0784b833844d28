"""The plain decoder that `benchmarks.sampling` measures against: correct, straightforward, and slow.

It does what a decoder does that was written without a thought for speed: caches and masks made anew for every call and
padded to a multiple of 8 positions; one square boolean mask per row; copies of all keys and values in every layer; the
attention over every slot of the cache; the unconditional half computed although nobody reads it any more; a sorted
top-k, a softmax and a multinomial over the whole codebook; the probabilities of every step kept to the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.config import find_multiple
from autoregressive.models.gpt import Transformer
from autoregressive.models.layers import TransformerBlock
from autoregressive.models.rope import apply_rotary_emb


class PlainDecoder:
    """Caches, masks and all steps of one generation; guidance with `cfg_scale` above 1."""

    def __init__(self, model: Transformer, labels: Tensor, cfg_scale: float) -> None:
        config, device = model.config, labels.device
        self.model, self.cfg_scale = model, cfg_scale
        self.cond = torch.cat([labels, torch.full_like(labels, config.num_classes)]) if cfg_scale > 1 else labels
        rows, slots = len(self.cond), find_multiple(config.cls_token_num + config.block_size, 8)
        shape = (rows, config.kv_heads, slots, config.head_dim)
        dtype = model.tok_embeddings.weight.dtype
        self.caches = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.n_layer)
        ]
        self.mask = torch.ones(slots, slots, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)
        self.kept: list[Tensor] = []

    def logits(self, h: Tensor, positions: Tensor) -> Tensor:
        """Guided float32 logits (B, S, V) after inputs `h` (rows, S, dim) at `positions` (S,)."""
        mask = self.mask[:, None, positions]
        angles = self.model.freqs_cis[positions]
        for block, cache in zip(self.model.layers, self.caches):
            h = h + self._attend(block, block.attention_norm(h), positions, mask, angles, cache)
            h = h + block.feed_forward(block.ffn_norm(h))
        logits = self.model.output(self.model.norm(h)).float()
        if self.cfg_scale <= 1:
            return logits
        cond, uncond = logits.chunk(2)
        return uncond + self.cfg_scale * (cond - uncond)

    @staticmethod
    def _attend(
        block: TransformerBlock,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        angles: Tensor,
        cache: tuple[Tensor, Tensor],
    ) -> Tensor:
        attention = block.attention
        kv_width = attention.n_kv_head * attention.head_dim
        q, k, v = attention.wqkv(x).split([attention.dim, kv_width, kv_width], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in (q, k, v))
        q, k = apply_rotary_emb(q, angles), apply_rotary_emb(k, angles)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        for store, new in zip(cache, (k, v)):
            store[:, :, positions] = new
        repeats = attention.n_head // attention.n_kv_head
        keys, values = (store.repeat_interleave(repeats, dim=1) for store in cache)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return attention.wo(out.transpose(1, 2).flatten(2))

    def draw(self, logits: Tensor, top_k: int, greedy: bool) -> Tensor:
        """Tokens int64 (B, 1) from the last of `logits` (B, S, V)."""
        last = logits[:, -1].clone()
        if top_k > 0:
            last[last < last.topk(min(top_k, last.shape[-1])).values[:, -1:]] = -torch.inf
        probs = last.softmax(dim=-1)
        self.kept.append(probs.clone())
        return probs.argmax(dim=-1, keepdim=True) if greedy else torch.multinomial(probs, num_samples=1)


@torch.no_grad()
def plain_generate(
    model: Transformer,
    labels: Tensor,
    count: int,
    cfg_scale: float,
    top_k: int,
    greedy: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Tokens int64 (B, count) of a class-conditional model in evaluation mode."""
    decoder = PlainDecoder(model, labels, cfg_scale)
    h = model.cls_embedding(decoder.cond, train=False)
    tokens = [decoder.draw(decoder.logits(h, torch.arange(1, device=labels.device)), top_k, greedy)]
    for position in range(1, count):
        if on_token is not None:
            on_token(position - 1)
        both = torch.cat([tokens[-1], tokens[-1]]) if cfg_scale > 1 else tokens[-1]
        h = model.tok_embeddings(both)
        logits = decoder.logits(h, torch.tensor([position], device=labels.device))
        tokens.append(decoder.draw(logits, top_k, greedy))
    if on_token is not None:
        on_token(count - 1)
    return torch.cat(tokens, dim=1)
