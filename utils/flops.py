"""What a GPT costs on paper: parameters, FLOPs and bytes, and the ceilings they are held against.

One multiply-add is two FLOPs, only matrix products count, and a backward pass costs twice its forward.
Attention is counted over the whole square of positions although half of it is masked (the usual convention
of MFU; PaLM, appendix B). Decoding is bound by memory: every step reads all matrix weights once, and the keys
and values of each row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import nn


class GPTShape(Protocol):
    """The sizes that decide the cost; the GPT's configuration has them all."""

    @property
    def dim(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn_hidden(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def cls_token_num(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def model_type(self) -> str: ...
    @property
    def caption_dim(self) -> int: ...


class Hardware(NamedTuple):
    """Ceilings of one device: dense bfloat16 FLOP/s and bytes/s of its memory, from the data sheet."""

    flops_per_second: float
    bytes_per_second: float


# Parts of the names that torch.cuda.get_device_name gives; the first that fits counts.
_HARDWARE: dict[str, Hardware] = {
    "B200": Hardware(2250e12, 8.0e12),
    "H200": Hardware(989e12, 4.8e12),
    "H100 PCIe": Hardware(756e12, 2.0e12),
    "H100": Hardware(989e12, 3.35e12),
    "A100-SXM4-40GB": Hardware(312e12, 1.555e12),
    "A100": Hardware(312e12, 2.039e12),
    "RTX 4090": Hardware(165e12, 1.008e12),
}


def hardware_of(device_name: str) -> Hardware | None:
    """The ceilings of the device with this name, or None if they are not known."""
    return next((hardware for part, hardware in _HARDWARE.items() if part in device_name), None)


def count_parameters(module: nn.Module, trainable_only: bool = True) -> int:
    """Number of parameters; shared ones count once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def block_weights(shape: GPTShape) -> int:
    """Matrix weights of all blocks: query, key, value and output projections, and the gated feed-forward."""
    projections = 2 * shape.dim * shape.dim + 2 * shape.dim * shape.kv_heads * shape.head_dim
    return shape.n_layer * (projections + 3 * shape.dim * shape.ffn_hidden)


def head_weights(shape: GPTShape) -> int:
    """Matrix weights of the output layer."""
    return shape.dim * shape.vocab_size


def forward_flops_per_image(shape: GPTShape) -> int:
    """FLOPs of one forward pass over a training sample: the condition and all image tokens but the last.

    The output layer runs only where an image token is predicted.
    """
    positions = shape.cls_token_num + shape.block_size - 1
    blocks = 2 * positions * block_weights(shape)
    head = 2 * shape.block_size * head_weights(shape)
    attention = positions * _attention_flops(shape, positions)
    return blocks + head + attention + _caption_flops(shape)


def training_flops_per_image(shape: GPTShape) -> int:
    """FLOPs of one forward and backward pass over a training sample."""
    return 3 * forward_flops_per_image(shape)


def training_flops_per_token(shape: GPTShape) -> float:
    """The same per image token: about 6 per matrix weight, and the attention."""
    return training_flops_per_image(shape) / shape.block_size


def decode_flops_per_token(shape: GPTShape, context: int) -> int:
    """FLOPs to decode one token of one row that attends to `context` positions, itself included."""
    return 2 * (block_weights(shape) + head_weights(shape)) + _attention_flops(shape, context)


def cache_bytes(shape: GPTShape, rows: int, positions: int, bytes_per_value: int = 2, bytes_per_scale: int = 0) -> int:
    """Bytes of the keys and values of `rows` sequences; guidance doubles the rows.

    Caches in 8 bits have a value of 1 byte and, for each key and each value vector, a scale of 4.
    """
    vectors = 2 * rows * positions * shape.n_layer * shape.kv_heads
    return vectors * (shape.head_dim * bytes_per_value + bytes_per_scale)


def decode_bytes_per_step(shape: GPTShape, rows: int, context: int, bytes_per_value: int = 2) -> int:
    """Bytes that one decoding step of `rows` sequences reads: all matrix weights once, and the filled cache.

    Every step gives one token per row, so this divided by the rows is the bytes per decoded token.
    """
    weights = (block_weights(shape) + head_weights(shape)) * bytes_per_value
    return weights + cache_bytes(shape, rows, context, bytes_per_value)


def decode_bytes_per_image(shape: GPTShape, rows: int, bytes_per_value: int = 2) -> float:
    """Bytes read to decode a whole batch, divided by its rows: block_size - 1 steps after the prefill."""
    first, steps = shape.cls_token_num + 1, shape.block_size - 1
    total = sum(decode_bytes_per_step(shape, rows, first + i, bytes_per_value) for i in range(steps))
    return total / rows


def mfu(flops: float, seconds: float, hardware: Hardware, devices: int = 1) -> float:
    """Model FLOPs utilisation: the share of the peak that `flops` in `seconds` on `devices` devices reach."""
    return flops / (seconds * devices * hardware.flops_per_second)


def _attention_flops(shape: GPTShape, context: int) -> int:
    """Scores and weighted sum of one query position over `context` keys, in all blocks."""
    return 4 * shape.n_layer * shape.dim * context


def _caption_flops(shape: GPTShape) -> int:
    """The two layers that bring caption features to the width of the model."""
    if shape.model_type != "t2i":
        return 0
    return 2 * shape.cls_token_num * (shape.caption_dim * shape.dim + shape.dim * shape.dim)
