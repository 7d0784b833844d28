"""Images to codes and back; on a CPU neither depends on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.nearest import exact_arithmetic
from tokenizer.tokenizer_image.vq_model import VQModel


@torch.no_grad()
def encode_images(tokenizer: VQModel, images: Tensor, batch_size: int = 16) -> Tensor:
    """The codes int32 (B, N) of images (B, 3, H, W) in [-1, 1], in full float32 whatever the surroundings.

    A GPU takes `batch_size` images at a time, without TF32 and by convolutions that do not depend on timing.
    """
    with exact_arithmetic(images.device.type):
        codes = torch.cat([tokenizer.encode(part)[2][2] for part in _parts(images.float(), batch_size)])
    return codes.view(len(images), -1).to(torch.int32)


@torch.no_grad()
def decode_codes(tokenizer: VQModel, codes: Tensor) -> Tensor:
    """Pictures of codes (B, h*w) on a square grid: (B, 3, H, W) float32, nominally in [-1, 1]."""
    edge = int(codes.shape[1] ** 0.5)
    shape = (tokenizer.config.codebook_embed_dim, edge, edge)
    return torch.cat([tokenizer.decode_code(part, (len(part), *shape)) for part in _parts(codes, 16)])


def _parts(rows: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Rows in the groups that go through a tokenizer together: on a CPU one at a time.

    There a convolution rounds differently for a batch of one, and with one thread for 16. A batch of pictures
    of 256 pixels would be no faster; one of 64 pixels would save two or three milliseconds a picture.
    """
    return rows.split(1 if rows.device.type == "cpu" else batch_size)
