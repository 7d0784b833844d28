"""Random numbers that are a function of (seed of the image, position, token), with no state on any device.

A counter-based generator gives every image its own numbers wherever and in whatever company it is drawn: in another
batch, on another rank, after a restart, on a GPU inside a captured graph, in C++. The generator is Philox 4x32-10
(Salmon, Moraes, Dror and Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds on unsigned 32-bit words held in int64 tensors of shapes that broadcast; four such words come out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits; the sign is masked away below
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def exponential_noise(seeds: Tensor, position: int | Tensor, count: int) -> Tensor:
    """Exponentially distributed noise float32 (B, count) of images with `seeds` int64 (B,) at `position`.

    `position` may be a tensor of one element, for loops that run inside a captured graph. Every value is above 0;
    one in 2^25 is infinite.
    """
    block = torch.arange(-(-count // 4), device=seeds.device)[None]
    key = seeds[:, None] & _LOW, (seeds[:, None] >> 32) & _LOW
    zero = torch.zeros_like(block)
    words = torch.stack(torch.broadcast_tensors(*philox((block, zero + position, zero, zero), key)), dim=-1)
    uniform = (words.flatten(1)[:, :count].float() + 0.5) * 2.0**-32  # fine near 0, where the winners are
    return -torch.log1p(-uniform)


class ImageNoise:
    """The noise of a batch of images: stands where a list of generators would, and counts the tokens drawn.

    `seeds` are integers below 2^63, one per image.
    """

    def __init__(self, seeds: Sequence[int] | Tensor, device: torch.device | str = "cpu", position: int = 0) -> None:
        self.seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
        self.position = position

    def __len__(self) -> int:
        return len(self.seeds)

    def advance(self) -> int:
        """The position whose turn it is; the next one comes after it."""
        self.position += 1
        return self.position - 1

    def exponential(self, count: int) -> Tensor:
        """Noise float32 (B, count) for the next token."""
        return exponential_noise(self.seeds, self.advance(), count)
