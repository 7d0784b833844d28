"""What training a GPT needs of a GPU's memory, in bytes, as a function of counts.

Master weights, gradients and AdamW's two moments are float32: 16 bytes per parameter, 20 with an EMA. Sharding divides
them by the processes that share a copy. What comes on top depends on the strategy and is counted here as if everything
stood at its peak at the same time: an upper estimate, without CUDA's context, NCCL's buffers and fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def images_that_fit(memory: float, state: float, per_image: float) -> int:
    """Images of one micro-batch that fit beside the state; 0 when not even one does."""
    return max(int((memory - state) // per_image), 0)
