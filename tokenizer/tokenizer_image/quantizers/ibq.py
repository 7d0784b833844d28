"""Index backpropagation quantization (Shi et al. 2024, arXiv:2412.02692): gradients flow through the choice of the
code, so that every code learns at every step, also those that were not chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer.nearest import nearest_codes, row_chunks
from tokenizer.tokenizer_image.quantizers.base import Quantizer
from tokenizer.tokenizer_image.quantizers.entropy import ENTROPY_TEMPERATURE, chunked_entropy_loss


class IBQ(Quantizer):
    """The code with the largest product with the latent vector is chosen; its one-hot index is given the gradient of
    the softmax over all products.

    Args:
        n_e: number of codes K.
        e_dim: channels D of a code.
        beta: weight of the commitment loss.
        entropy_loss_ratio: weight of the entropy loss; 0 leaves it out.
        show_usage: keep the last 65,536 codes seen in training and report the share of the codebook in them.
    """

    mark = "softmax_temperature"

    def __init__(self, n_e: int, e_dim: int, beta: float, entropy_loss_ratio: float, show_usage: bool) -> None:
        super().__init__(n_e, e_dim, show_usage)
        self.beta, self.entropy_loss_ratio = beta, entropy_loss_ratio
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.register_buffer("softmax_temperature", torch.ones(()))
        self._register_usage()

    def assign(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        codebook = self.embedding.weight.to(latents.dtype)
        # The largest product, not the smallest distance: `unit_length` means just that.
        indices = nearest_codes(latents.detach(), codebook.detach(), unit_length=True)
        codes = F.embedding(indices, codebook)
        if not self.training:
            return codes, (latents.new_zeros(()),) * 3, indices
        soft = self._soft_codes(latents, codebook)
        quant = codes + (soft - soft.detach())  # the value of the hard choice, the gradient of both
        # Double quantization loss: latents and codes are drawn together through the index as well as directly.
        vq_loss = F.mse_loss(quant, latents) + F.mse_loss(codes, latents.detach())
        commit_loss = self.beta * F.mse_loss(latents, codes.detach())
        return quant, (vq_loss, commit_loss, self._entropy_loss(latents, codebook)), indices

    def codebook(self) -> Tensor:
        return self.embedding.weight

    @torch.no_grad()
    def replace(self, which: Tensor, vectors: Tensor) -> None:
        self.embedding.weight[which] = vectors.to(self.embedding.weight.dtype)

    def _soft_codes(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """Softmax-weighted means of the (fixed) codes, (N, D); computed in chunks, and again in the backward pass."""

        def mean_code(chunk: Tensor, codes: Tensor) -> Tensor:
            return F.softmax(chunk @ codes.T / self.softmax_temperature, dim=-1) @ codes.detach()

        chunks = latents.split(row_chunks(len(latents), self.n_e))
        return torch.cat([checkpoint(mean_code, chunk, codebook, use_reentrant=False) for chunk in chunks])

    def _entropy_loss(self, latents: Tensor, codebook: Tensor) -> Tensor:
        if self.entropy_loss_ratio == 0:
            return latents.new_zeros(())
        loss = chunked_entropy_loss(latents, codebook, lambda z, codes: z @ codes.T / ENTROPY_TEMPERATURE)
        return self.entropy_loss_ratio * loss
