"""Both discriminators under distinct names."""

from __future__ import annotations

from tokenizer.tokenizer_image.discriminator_patchgan import ActNorm
from tokenizer.tokenizer_image.discriminator_patchgan import NLayerDiscriminator as PatchGANDiscriminator
from tokenizer.tokenizer_image.discriminator_stylegan import Blur, DiscriminatorBlock
from tokenizer.tokenizer_image.discriminator_stylegan import Discriminator as StyleGANDiscriminator

__all__ = ["ActNorm", "Blur", "DiscriminatorBlock", "PatchGANDiscriminator", "StyleGANDiscriminator"]
