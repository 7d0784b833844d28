"""The established quantizer: unit-length codes that learn by gradient (LlamaGen, section 2.1; ViT-VQGAN, Yu et al.
2021, arXiv:2110.04627, for the normalisation; van den Oord et al. 2017, arXiv:1711.00937, for the losses)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.nearest import nearest_codes
from tokenizer.tokenizer_image.quantizers.base import Quantizer, straight_through
from tokenizer.tokenizer_image.quantizers.entropy import chunked_entropy_loss, distance_logits


class VectorQuantizer(Quantizer):
    """Replaces every latent vector by its nearest code and passes gradients straight through.

    Args:
        n_e: number of codes K.
        e_dim: channels D of a code.
        beta: weight of the commitment loss.
        entropy_loss_ratio: weight of the entropy loss; 0 leaves it out.
        l2_norm: compare unit-length latents with unit-length codes.
        show_usage: keep the last 65,536 codes seen in training and report the share of the codebook in them.
    """

    mark = "embedding.weight"

    def __init__(
        self, n_e: int, e_dim: int, beta: float, entropy_loss_ratio: float, l2_norm: bool, show_usage: bool
    ) -> None:
        super().__init__(n_e, e_dim, show_usage)
        self.beta = beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        if l2_norm:
            self.embedding.weight.data.copy_(F.normalize(self.embedding.weight.data, dim=-1))
        self._register_usage()

    def assign(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        codebook = self.codebook().to(latents.dtype)
        latents = self.place(latents)
        indices = nearest_codes(latents.detach(), codebook.detach(), self.l2_norm)
        codes = F.embedding(indices, codebook)
        vq_loss = F.mse_loss(codes, latents.detach())
        commit_loss = self.beta * F.mse_loss(latents, codes.detach())
        losses = (vq_loss, commit_loss, self._entropy_loss(latents, codebook))
        return straight_through(latents, codes), losses, indices

    def codebook(self) -> Tensor:
        return self.place(self.embedding.weight)

    def place(self, latents: Tensor) -> Tensor:
        return F.normalize(latents, dim=-1) if self.l2_norm else latents

    @torch.no_grad()
    def replace(self, which: Tensor, vectors: Tensor) -> None:
        self.embedding.weight[which] = vectors.to(self.embedding.weight.dtype)

    def _entropy_loss(self, latents: Tensor, codebook: Tensor) -> Tensor:
        if self.entropy_loss_ratio == 0 or not self.training:
            return latents.new_zeros(())
        return self.entropy_loss_ratio * chunked_entropy_loss(latents, codebook, distance_logits)
