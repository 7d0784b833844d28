"""What every quantizer of this family is: latents in; quantized latents, losses and indices out.

A quantizer is pure: it knows no processes. What it has to learn over all of them, `Quantizer.update` takes through
the `reduce` that the training recipe gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenizer.nearest import at_least_float32, lookup

USAGE_WINDOW = 65_536

# vq_loss, commit_loss, entropy_loss (None in evaluation mode) and codebook usage in [0, 1]
EmbeddingLoss = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | int]


class Quantizer(nn.Module):
    """Replaces every latent vector by one of K codes and passes gradients on to the encoder.

    A kind of quantizer gives `assign` and `codebook`; one that learns its codes gives `replace` too.

    Args:
        n_e: number of codes K.
        e_dim: channels D of a code.
        show_usage: keep the last 65,536 codes seen in training and report the share of the codebook in them.
    """

    mark: ClassVar[str] = ""  # a state-dict key that no other kind has
    learned: ClassVar[bool] = True  # whether codes can be placed: k-means start, revival

    def __init__(self, n_e: int, e_dim: int, show_usage: bool) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.show_usage = n_e, e_dim, show_usage

    def _register_usage(self) -> None:
        if self.show_usage:
            self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW))

    def forward(self, z: Tensor) -> tuple[Tensor, EmbeddingLoss, tuple[None, None, Tensor]]:
        """Quantize.

        Args:
            z: (B, D, H, W) latents, any float dtype; the arithmetic is at least float32, also under autocast.

        Returns:
            ``(quant, (vq_loss, commit_loss, entropy_loss, usage), (None, None, indices))`` with `quant` like
            `z`, 0-d losses and usage, `indices` (B*H*W,) int64 in order batch, row, column. In evaluation
            mode the losses are None and the usage is 0.
        """
        with torch.autocast(z.device.type, enabled=False):
            latents = at_least_float32(z.permute(0, 2, 3, 1))
            quant, losses, indices = self.assign(latents.reshape(-1, self.e_dim))
            loss: EmbeddingLoss = (None, None, None, 0)
            if self.training:
                loss = (*losses, self._track_usage(indices))
        quant = quant.view_as(latents).permute(0, 3, 1, 2).contiguous().to(z.dtype)
        return quant, loss, (None, None, indices)

    def assign(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        """Latents (N, D) to quantized ones alike, the vq, commitment and entropy losses (0-d), and indices (N,) int64.

        The losses may be anything in evaluation mode.
        """
        raise NotImplementedError

    def codebook(self) -> Tensor:
        """All codes, (K, D), as they enter the decoder."""
        raise NotImplementedError

    def place(self, latents: Tensor) -> Tensor:
        """Where latents (N, D) lie among the codes: on the unit sphere for unit-length codes, else unchanged."""
        return latents

    @torch.no_grad()
    def replace(self, which: Tensor, vectors: Tensor) -> None:
        """Move the codes that the bool mask `which` (K,) marks onto `vectors` (their number, D)."""
        raise ValueError(f"The codes of {type(self).__name__} are fixed: they cannot be placed.")

    @torch.no_grad()
    def update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Learn from the batches since the last call, for quantizers that do so without gradients.

        `reduce` sums a tensor over all processes; each then learns the same.
        """

    def in_use(self) -> Tensor:
        """(K,) float, 1 for the codes that count as alive; the others may be revived."""
        return self.seen()

    def seen(self) -> Tensor:
        """(K,) float, 1 for the codes in this process's usage window."""
        window = self.codebook_used
        return torch.zeros(self.n_e, device=window.device).scatter_(0, window.long(), 1.0)

    def get_codebook_entry(
        self, indices: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Tensor:
        """Codes of the given indices as they enter the decoder, laid out by `tokenizer.nearest.lookup`.

        `shape` is (B, D, H, W), or (B, H, W, D) without `channel_first`; None gives ``indices.shape + (D,)``.
        Raises IndexError for an index that is negative or too large.
        """
        return lookup(indices, self.codebook(), shape, channel_first)

    @torch.no_grad()
    def _track_usage(self, indices: Tensor) -> Tensor | int:
        """Move the window on by the new codes; returns its distinct codes / K, a 0-d float tensor."""
        if not self.show_usage:
            return 0
        window = self.codebook_used
        newest = indices[-len(window) :].to(window.dtype)
        window.copy_(torch.cat([window[len(newest) :], newest]))
        return self.seen().mean()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a usage window of any length, or none: it is a statistic, not a weight."""
        stored = state_dict.pop(f"{prefix}codebook_used", None)
        if self.show_usage:
            window = self.codebook_used.detach().clone()
            if stored is not None:
                newest = stored[-len(window) :]
                window = torch.cat([newest.new_zeros(len(window) - len(newest)), newest])
            state_dict[f"{prefix}codebook_used"] = window
        super()._load_from_state_dict(state_dict, prefix, *args)


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes`, the gradient of `latents`."""
    return latents + (codes - latents).detach()
