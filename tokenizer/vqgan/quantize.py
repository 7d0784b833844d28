"""The quantizer of the taming-transformers VQGAN: plain Euclidean distance, no normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.nearest import at_least_float32, lookup, nearest_codes


class VectorQuantizer2(nn.Module):
    """Replaces every latent vector by its nearest code and passes gradients straight through.

    Args:
        n_e: number of codes K.
        e_dim: channels D of a code.
        beta: weight of one of the two loss terms, see `legacy`.
        remap: .npy file with the subset of codes in use; indices then count within this subset.
        unknown_index: what stands for a code outside the subset: 'random', an index, or 'extra' (one more).
        sane_index_shape: indices come as (B, H, W) instead of flat.
        legacy: `beta` weighs the codebook term, as in the published models, and not the commitment term.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.remap = remap
        if remap is not None:
            self.register_buffer("used", torch.from_numpy(np.load(remap)).long())
            self.unknown_index = len(self.used) if unknown_index == "extra" else unknown_index

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """(B, D, H, W) latents to ``(quant, loss, (None, None, indices))``: `quant` like `z`, `loss` 0-d."""
        with torch.autocast(z.device.type, enabled=False):
            latents = at_least_float32(z.permute(0, 2, 3, 1))
            codebook = self.embedding.weight.to(latents.dtype)
            indices = nearest_codes(latents.detach().reshape(-1, self.e_dim), codebook.detach(), False)
            codes = F.embedding(indices, codebook).view(latents.shape)
            commitment, codebook_loss = (
                F.mse_loss(latents, codes.detach()),
                F.mse_loss(codes, latents.detach()),
            )
            if self.legacy:
                loss = commitment + self.beta * codebook_loss
            else:
                loss = codebook_loss + self.beta * commitment
            quant = latents + (codes - latents).detach()
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if self.sane_index_shape:
            indices = indices.view(latents.shape[:3])
        return quant.permute(0, 3, 1, 2).contiguous().to(z.dtype), loss, (None, None, indices)

    def get_codebook_entry(
        self, indices: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Tensor:
        """Codes of the given indices, laid out by `tokenizer.nearest.lookup`."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        return lookup(indices, self.embedding.weight, shape, channel_first)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Indices into the codebook to indices into the subset in use."""
        position = inds.new_full((self.n_e,), -1)
        position[self.used] = torch.arange(len(self.used), device=inds.device)
        mapped = position[inds]
        if self.unknown_index == "random":
            unknown = torch.randint_like(mapped, len(self.used))
        else:
            unknown = torch.full_like(mapped, int(self.unknown_index))
        return torch.where(mapped < 0, unknown, mapped)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Indices into the subset in use to indices into the codebook; the extra one to the first in use."""
        return self.used[torch.where(inds < len(self.used), inds, 0)]


VectorQuantizer = VectorQuantizer2
