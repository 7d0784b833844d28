"""The training loss of the VQ tokenizer (LlamaGen, section 2.1; VQGAN for the adversarial part).

One module holds both sides of the game: ``optimizer_idx=0`` gives the tokenizer's loss, ``optimizer_idx=1``
the discriminator's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image.adversarial import (
    adopt_weight,
    hinge_d_loss,
    hinge_gen_loss,
    non_saturating_d_loss,
    non_saturating_gen_loss,
    vanilla_d_loss,
)
from tokenizer.tokenizer_image.discriminator_patchgan import NLayerDiscriminator
from tokenizer.tokenizer_image.discriminator_stylegan import Discriminator as StyleGANDiscriminator
from tokenizer.tokenizer_image.lpips import LPIPS

__all__ = [
    "VQLoss",
    "adopt_weight",
    "hinge_d_loss",
    "hinge_gen_loss",
    "non_saturating_d_loss",
    "non_saturating_gen_loss",
    "vanilla_d_loss",
]

DISCRIMINATOR_LOSSES = {
    "hinge": hinge_d_loss,
    "vanilla": vanilla_d_loss,
    "non-saturating": non_saturating_d_loss,
}
GENERATOR_LOSSES = {"hinge": hinge_gen_loss, "non-saturating": non_saturating_gen_loss}
RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "l1+l2": lambda x, y: F.l1_loss(x, y) + F.mse_loss(x, y),
}
DISCRIMINATORS = ("patchgan", "stylegan")


class VQLoss(nn.Module):
    """Weighted sum of reconstruction, perceptual, codebook and adversarial terms.

    `terms` holds the detached, weighted 0-d terms of the last call, by name. A weight of 0 leaves its network
    out: `perceptual_loss` or `discriminator` is then None.

    Args:
        disc_start: first step with adversarial terms.
        disc_loss, gen_adv_loss: 'hinge', 'non-saturating', and for the discriminator also 'vanilla'.
        disc_dim, disc_num_layers: size of the 'patchgan' discriminator.
        disc_type: 'patchgan' or 'stylegan'.
        image_size: side of the images, on which 'stylegan' depends; 'patchgan' needs 3 * 2 ** disc_num_layers.
        disc_in_channels: image channels.
        disc_weight: weight of the adversarial terms, on both sides.
        disc_adaptive_weight: scale the adversarial gradient at `last_layer` to the reconstruction gradient.
        reconstruction_loss: 'l2', 'l1' or 'l1+l2', averaged over all elements.
        codebook_weight: weight of the sum of the quantizer's three losses.
        gradient_weight: weight of the L1 distance of neighbouring-pixel differences, which keeps edges sharp.
        vgg_path: state dict of torchvision's vgg16 for LPIPS; None downloads it.
        lpips_pretrained: off leaves LPIPS at random weights, to be filled from a state dict.
    """

    def __init__(
        self,
        disc_start: int,
        disc_loss: str = "hinge",
        disc_dim: int = 64,
        disc_type: str = "patchgan",
        image_size: int = 256,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_weight: float = 1.0,
        disc_adaptive_weight: bool = False,
        gen_adv_loss: str = "hinge",
        reconstruction_loss: str = "l2",
        reconstruction_weight: float = 1.0,
        codebook_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        gradient_weight: float = 0.0,
        vgg_path: str | None = None,
        lpips_pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.disc_loss = _choose("disc_loss", disc_loss, DISCRIMINATOR_LOSSES)
        self.gen_adv_loss = _choose("gen_adv_loss", gen_adv_loss, GENERATOR_LOSSES)
        self.rec_loss = _choose("reconstruction_loss", reconstruction_loss, RECONSTRUCTION_LOSSES)
        if disc_type not in DISCRIMINATORS:
            raise ValueError(f"disc_type must be one of {list(DISCRIMINATORS)}, but is {disc_type!r}.")
        self.discriminator: nn.Module | None = None
        if disc_weight and disc_type == "patchgan":
            _check_size(image_size, disc_num_layers)
            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_dim, disc_num_layers)
        elif disc_weight:
            self.discriminator = StyleGANDiscriminator(disc_in_channels, image_size=image_size)
        self.perceptual_loss: nn.Module | None = None
        if perceptual_weight:
            self.perceptual_loss = LPIPS(pretrained=lpips_pretrained, weights_path=vgg_path)
        self.disc_start = disc_start
        self.disc_weight = disc_weight
        self.disc_adaptive_weight = disc_adaptive_weight
        self.rec_weight = reconstruction_weight
        self.codebook_weight = codebook_weight
        self.perceptual_weight = perceptual_weight
        self.gradient_weight = gradient_weight
        self.terms: dict[str, Tensor] = {}

    def is_adversarial(self, global_step: int) -> bool:
        """Whether the discriminator takes part at this step; before, its loss is a constant 0."""
        return self.discriminator is not None and global_step >= self.disc_start

    def forward(
        self,
        codebook_loss: Sequence[Tensor | float] | None,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        logger: logging.Logger | None = None,
        log_every: int = 100,
    ) -> Tensor | None:
        """The loss of one side, 0-d; its parts are left in `terms`.

        Args:
            codebook_loss: vq, commitment and entropy loss and usage, from the quantizer in training mode.
            inputs, reconstructions: (B, C, H, W) in [-1, 1].
            optimizer_idx: 0 for the tokenizer, 1 for the discriminator; anything else has no loss, None.
            global_step: number of this step, from 1 on; adversarial terms are active from `disc_start` on.
            last_layer: ``decoder.last_layer``, needed with `disc_adaptive_weight`.
            logger: gets a line with all terms whenever `global_step` is a multiple of `log_every`.
        """
        if optimizer_idx == 0:
            assert codebook_loss is not None
            loss = self._generator_loss(codebook_loss, inputs, reconstructions, global_step, last_layer)
        elif optimizer_idx == 1:
            loss = self._discriminator_loss(inputs, reconstructions, global_step)
        else:
            return None
        if logger is not None and log_every > 0 and global_step % log_every == 0:
            side = "Generator" if optimizer_idx == 0 else "Discriminator"
            logger.info(f"({side}) " + ", ".join(f"{name}: {term:.4f}" for name, term in self.terms.items()))
        return loss

    def _generator_loss(
        self,
        codebook_loss: Sequence[Tensor | float],
        inputs: Tensor,
        reconstructions: Tensor,
        global_step: int,
        last_layer: Tensor | None,
    ) -> Tensor:
        terms = self._similarity_terms(inputs, reconstructions)
        similarity = torch.stack(list(terms.values())).sum()
        names = ("vq_loss", "commit_loss", "entropy_loss")
        terms |= {name: self.codebook_weight * loss for name, loss in zip(names, codebook_loss)}
        disc_weight = adopt_weight(self.disc_weight, global_step, threshold=self.disc_start)
        adaptive_weight, adversarial = inputs.new_ones(()), inputs.new_zeros(())
        if self.is_adversarial(global_step):
            with frozen(self.discriminator):
                adversarial = self.gen_adv_loss(self.discriminator(reconstructions))
            if self.disc_adaptive_weight:
                adaptive_weight = adaptive_disc_weight(similarity, adversarial, last_layer)
            adversarial = adaptive_weight * disc_weight * adversarial
        loss = similarity + sum(terms[name] for name in names) + adversarial
        terms |= {
            "codebook_usage": codebook_loss[3],
            "generator_adv_loss": adversarial,
            "disc_adaptive_weight": adaptive_weight,
            "disc_weight": disc_weight,
        }
        self._keep(terms)
        return loss

    def _similarity_terms(self, inputs: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """The weighted terms that compare the two images."""
        inputs, reconstructions = inputs.contiguous(), reconstructions.contiguous()
        terms = {"rec_loss": self.rec_weight * self.rec_loss(inputs, reconstructions)}
        perceptual = inputs.new_zeros(())
        if self.perceptual_loss is not None:
            perceptual = self.perceptual_weight * self.perceptual_loss(inputs, reconstructions).mean()
        terms["perceptual_loss"] = perceptual
        if self.gradient_weight:
            terms["grad_loss"] = self.gradient_weight * gradient_loss(inputs, reconstructions)
        return terms

    def _discriminator_loss(self, inputs: Tensor, reconstructions: Tensor, global_step: int) -> Tensor:
        real = fake = loss = inputs.new_zeros(())
        disc_weight = adopt_weight(self.disc_weight, global_step, threshold=self.disc_start)
        if self.is_adversarial(global_step):
            real = self.discriminator(inputs.detach())
            fake = self.discriminator(reconstructions.detach())
            loss = disc_weight * self.disc_loss(real, fake)
        self._keep(
            {
                "discriminator_adv_loss": loss,
                "disc_weight": disc_weight,
                "logits_real": real.mean(),
                "logits_fake": fake.mean(),
            }
        )
        return loss

    def _keep(self, terms: dict[str, Tensor | float]) -> None:
        self.terms = {name: torch.as_tensor(term).detach() for name, term in terms.items()}


def _choose(what: str, name: str, known: dict[str, Callable]) -> Callable:
    if name not in known:
        raise ValueError(f"{what} must be one of {list(known)}, but is {name!r}.")
    return known[name]


def _check_size(image_size: int, layers: int) -> None:
    smallest = 3 * 2**layers  # three pixels before the two last convolutions, which take one each
    if image_size < smallest:
        raise ValueError(
            f"The 'patchgan' discriminator needs images of {smallest} pixels and more, these have {image_size}: "
            f"take disc_type 'stylegan' or no discriminator (disc_weight 0)."
        )


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the parameters of `module` in what is computed inside; inputs still get theirs."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def adaptive_disc_weight(nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None) -> Tensor:
    """Ratio of both losses' gradient norms at `last_layer`, between 0 and 10,000, detached (VQGAN, eq. 7)."""
    if last_layer is None:
        raise ValueError("The adaptive discriminator weight needs last_layer: pass decoder.last_layer.")
    nll_grad, g_grad = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll_loss, g_loss))
    return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def gradient_loss(inputs: Tensor, reconstructions: Tensor) -> Tensor:
    """L1 distance of the differences between neighbouring pixels, averaged over both directions' elements."""
    error = inputs.float() - reconstructions.float()
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
