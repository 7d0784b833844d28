"""What a GPT is made of: the fields of its configuration and the published sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of `k` that is at least `n`."""
    return -(-n // k) * k


@dataclass
class ModelArgs:
    """Everything that shapes a `Transformer`.

    `max_batch_size` and `max_seq_len` shape nothing: they stand here because saved configurations carry them.
    """

    dim: int = 4096
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None  # None: as many as n_head
    multiple_of: int = 256  # the hidden width of the feed-forward layers is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0

    num_classes: int = 1000
    caption_dim: int = 2048
    class_dropout_prob: float = 0.1
    model_type: str = "c2i"  # "c2i": class to image, "t2i": text to image

    vocab_size: int = 16384
    cls_token_num: int = 1  # positions of the condition: 1 for a class, 120 for a caption
    block_size: int = 256  # image tokens, a square number

    max_batch_size: int = 32
    max_seq_len: int = 2048

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_head

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of the feed-forward layers: two thirds of 4*dim, rounded up to `multiple_of`."""
        hidden = 2 * (4 * self.dim) // 3
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return find_multiple(hidden, self.multiple_of)

    @property
    def grid_size(self) -> int:
        """Edge of the square token grid."""
        return math.isqrt(self.block_size)

    def validate(self) -> None:
        """Raise ValueError where the fields cannot make a model."""
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type is 'c2i' or 't2i', not {self.model_type!r}")
        if self.grid_size**2 != self.block_size:
            raise ValueError(f"block_size {self.block_size} is not a square number, as the token grid is")
        if self.dim % self.n_head:
            raise ValueError(f"dim {self.dim} is not divisible by n_head {self.n_head}")
        if self.head_dim % 4:
            raise ValueError(f"dim / n_head is {self.head_dim}; 2-D rotary embedding needs a multiple of 4")
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.model_type == "c2i" and self.cls_token_num != 1:
            raise ValueError(f"a class takes one position: cls_token_num must be 1, not {self.cls_token_num}")


# GPT-XS and GPT-S suit a laptop; the other eight are the published sizes.
SIZES: dict[str, dict[str, int]] = {
    "GPT-XS": {"n_layer": 4, "n_head": 4, "dim": 128},
    "GPT-S": {"n_layer": 6, "n_head": 6, "dim": 192},
    "GPT-B": {"n_layer": 12, "n_head": 12, "dim": 768},
    "GPT-L": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "GPT-XL": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "GPT-XXL": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "GPT-XXXL": {"n_layer": 48, "n_head": 40, "dim": 2560},
    "GPT-1B": {"n_layer": 22, "n_head": 32, "dim": 2048},
    "GPT-3B": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "GPT-7B": {"n_layer": 32, "n_head": 32, "dim": 4096},
}
_SIZE_DEFAULTS: dict[str, dict[str, Any]] = {"GPT-XS": {"multiple_of": 64}, "GPT-S": {"multiple_of": 64}}


def sized_args(size: str, **fields: Any) -> ModelArgs:
    """The configuration of a named size. `fields` sets everything but depth, heads and width (TypeError)."""
    return ModelArgs(**SIZES[size], **{**_SIZE_DEFAULTS.get(size, {}), **fields})
