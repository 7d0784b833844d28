"""What training a GPT needs of a GPU's memory, in bytes, as a function of counts.

Master weights, gradients and AdamW's two moments are float32: 16 bytes per parameter, 20 with an EMA. Sharding divides
them by the processes that share a copy. What comes on top depends on the strategy and is counted here as if everything
stood at its peak at the same time: an upper estimate, without CUDA's context, NCCL's buffers and fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

from utils.flops import GPTShape

STATE = 4 + 4 + 8  # weight, gradient, two moments
EMA = 4
WORKING = 2  # a weight as bfloat16, for the matrix products


@dataclass(frozen=True)
class Weights:
    """Parameters of a model: of one block, and of everything that is in no block."""

    blocks: int
    block: int
    root: int

    @property
    def total(self) -> int:
        return self.blocks * self.block + self.root


def state_bytes(weights: Weights, strategy: str = "ddp", shards: int = 1, ema: bool = False) -> int:
    """Weights, gradients, moments, and the working copies of the weights, on each GPU.

    Args:
        strategy: "ddp", "sdp", "fsdp"; "hsdp" is fsdp over the GPUs that share a copy.
        shards: GPUs that share one copy; without meaning for ddp.
    """
    per_weight = STATE + EMA * ema
    if strategy == "ddp":
        return weights.total * (per_weight + WORKING)  # autocast keeps the bfloat16 copies until the backward pass
    # Gathered as bfloat16: everything outside the blocks, and of these all, or one in use and one on its way. The
    # gradients of one unit are whole until they are summed: bfloat16, and float32 for the sum.
    gathered = weights.blocks if strategy == "sdp" else min(2, weights.blocks)
    working = WORKING * (weights.root + gathered * weights.block)
    reducing = (WORKING + 4) * max(weights.root, weights.block)
    return -(-weights.total * per_weight // shards) + working + reducing


def compiled_block_bytes(shape: GPTShape, checkpointing: str = "none", stream: int = 4) -> int:
    """Bytes of one position that a block compiled by torch.compile keeps from its forward to its backward pass.

    Matrix products are bfloat16 and there is dropout. Compiled, of the results between two products the cheap ones are
    computed again: it keeps what the products and attention read, and the feed-forward's gate and its linear part.

    Args:
        checkpointing: "none"; "selective": the results of products and attention; "full": the input of the block.
        stream: bytes of a number that blocks hand to each other.

    Raises:
        ValueError: for another `checkpointing`.
    """
    dim, kv, hidden = shape.dim, shape.kv_heads * shape.head_dim, shape.ffn_hidden
    if checkpointing == "full":
        return stream * dim
    sums = 4 * dim // shape.head_dim  # logarithms of the sums of attention's softmax, float32
    products = WORKING * ((dim + 2 * kv) + dim + 2 * hidden) + sums  # query, key, value; attention; gate, linear part
    if checkpointing == "selective":
        return stream * dim + products + WORKING * dim  # the output projection's result too
    if checkpointing != "none":
        raise ValueError(f"checkpointing is 'none', 'selective' or 'full', not {checkpointing!r}")
    inputs = WORKING * (2 * dim + (dim + kv) + hidden)  # of the products: two norms, rotated heads, gated
    masks = 2 * dim  # of dropout, a byte each
    return 2 * stream * dim + inputs + products + masks


def images_that_fit(memory: float, state: float, per_image: float) -> int:
    """Images of one micro-batch that fit beside the state; 0 when not even one does."""
    return max(int((memory - state) // per_image), 0)
