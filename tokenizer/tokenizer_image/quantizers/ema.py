"""Plain vector quantization whose codes are running means of the latents assigned to them, with revival of dead codes.

Van den Oord et al. 2017 (arXiv:1711.00937), appendix A.1; VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446).
Revival as the random restarts of Jukebox (Dhariwal et al. 2020, arXiv:2005.00341).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.nearest import nearest_codes
from tokenizer.tokenizer_image.quantizers.base import Quantizer, straight_through

DEAD_BELOW = 0.03  # of the mean cluster size: such a code counts as dead


class EMAQuantizer(Quantizer):
    """Nearest code by Euclidean distance; codes learn from `update`, not from gradients.

    Args:
        n_e: number of codes K.
        e_dim: channels D of a code.
        beta: weight of the commitment loss, the only loss.
        show_usage: keep the last 65,536 codes seen in training and report the share of the codebook in them.
        decay: of the running means.
    """

    mark = "cluster_size"

    def __init__(self, n_e: int, e_dim: int, beta: float, show_usage: bool, decay: float = 0.99) -> None:
        super().__init__(n_e, e_dim, show_usage)
        self.beta, self.decay = beta, decay
        self.embedding = nn.Embedding(n_e, e_dim).requires_grad_(False)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.register_buffer("cluster_size", torch.ones(n_e))
        self.register_buffer("cluster_sum", self.embedding.weight.detach().clone())
        # What training batches added since the last update: members in column 0, sums in the others.
        self.register_buffer("fresh", torch.zeros(n_e, 1 + e_dim), persistent=False)
        self._register_usage()

    def assign(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        codebook = self.embedding.weight.to(latents.dtype)
        indices = nearest_codes(latents.detach(), codebook, False)
        codes = F.embedding(indices, codebook)
        if self.training:
            with torch.no_grad():
                rows = F.pad(latents.detach(), (1, 0), value=1.0)
                self.fresh.index_add_(0, indices, rows.to(self.fresh.dtype))
        zero = latents.new_zeros(())
        losses = (zero, self.beta * F.mse_loss(latents, codes), zero)
        return straight_through(latents, codes), losses, indices

    def codebook(self) -> Tensor:
        return self.embedding.weight

    @torch.no_grad()
    def update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        fresh = reduce(self.fresh)
        whole = fresh.isfinite().all()  # not so where fp16 overflowed; the optimizer leaves such a step out too
        share = (1 - self.decay) * whole
        fresh = fresh.nan_to_num(0.0, 0.0, 0.0)
        self.cluster_size.lerp_(fresh[:, 0], share)
        self.cluster_sum.lerp_(fresh[:, 1:], share)
        self.fresh.zero_()
        # A code that nobody chooses keeps its place: sum and size fall alike, and nothing is divided by almost nothing.
        chosen = (self.cluster_size > 1e-6)[:, None]
        means = self.cluster_sum / self.cluster_size.clamp(min=1e-6)[:, None]
        self.embedding.weight.copy_(torch.where(chosen, means, self.embedding.weight))

    @torch.no_grad()
    def replace(self, which: Tensor, vectors: Tensor) -> None:
        size = self.cluster_size.mean().clamp(min=1e-6)
        self.embedding.weight[which] = vectors.to(self.embedding.weight.dtype)
        self.cluster_size[which] = size
        self.cluster_sum[which] = size * self.embedding.weight[which]

    def in_use(self) -> Tensor:
        """(K,) float, 1 for the codes whose running cluster size is not far below the mean one."""
        return (self.cluster_size >= DEAD_BELOW * self.cluster_size.mean()).float()
