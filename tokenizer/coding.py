"""Images to codes and back, as each device does it best: how many at a time, in which layout and number format.

On a CPU neither depends on what else is in the batch. There a convolution rounds differently for a batch of one, and
with one thread for 16, so images go one at a time. A batch of images of 256 pixels would be no faster; one of 64
pixels would save two or three milliseconds an image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenizer.layers import CodeAutoencoder
from tokenizer.nearest import exact_arithmetic
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.batches import in_batches
from utils.precision import DTYPES

GPU_BATCH = 32  # images that a GPU takes at a time: enough to fill one, and ten crops of 384 pixels fit in memory
ENCODE_PRECISIONS = ("exact", "tf32")


def layout_of(device: torch.device | str, compiled: bool = False) -> torch.memory_format:
    """The memory format in which a tokenizer is fastest.

    Channels last suits convolutions, but PyTorch's GroupNorm on a GPU computes in the other one: every block would copy
    its feature map twice. Compiled code has a GroupNorm of its own.
    """
    return torch.channels_last if compiled or torch.device(device).type == "cpu" else torch.contiguous_format


class _Parts:
    """The groups in which rows go through a tokenizer; smaller for good once the memory did not suffice."""

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, found {batch_size}")
        self.batch_size = batch_size

    def apply(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``work(rows)``, group by group."""
        if not len(rows):
            return work(rows)
        size = 1 if rows.device.type == "cpu" else self.batch_size
        groups = [range(len(rows))[first : first + size] for first in range(0, len(rows), size)]
        try:
            done = list(in_batches(lambda numbers: work(rows[numbers[0] : numbers[-1] + 1]), groups))
        except ValueError as error:
            if isinstance(error.__cause__, (RuntimeError, MemoryError)):  # whoever calls may have memory to give back
                raise error.__cause__ from None
            raise
        if len(done) > len(groups):
            self.batch_size = max(len(numbers) for numbers, _ in done)
        return torch.cat([result for _, result in done])


_parts_of: WeakKeyDictionary[CodeAutoencoder, _Parts] = WeakKeyDictionary()  # for `decode_codes`


class ImageEncoder:
    """Images to codes, in full float32 whatever the surroundings.

    A GPU takes `batch_size` images at a time (halves of that, from there on, where its memory does not suffice),
    without TF32 and by convolutions that do not depend on timing. `precision` "tf32" lets its convolutions use TF32:
    several times as fast, and a few codes are others. On a CPU it changes nothing.

    Raises:
        ValueError: an unknown precision, or a batch size below 1.
    """

    def __init__(self, tokenizer: CodeAutoencoder, batch_size: int = GPU_BATCH, precision: str = "exact") -> None:
        if precision not in ENCODE_PRECISIONS:
            raise ValueError(f"images are encoded as {' or '.join(ENCODE_PRECISIONS)}, not as {precision!r}")
        self.tokenizer, self.precision, self.parts = tokenizer, precision, _Parts(batch_size)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Codes int32 (B, N) of images (B, 3, H, W) in [-1, 1]."""
        with exact_arithmetic(images.device.type, tf32_convolutions=self.precision == "tf32"):
            codes = self.parts.apply(lambda part: self.tokenizer.encode(part)[2][2], images.float())
        return codes.view(len(images), -1).to(torch.int32)

    def of_views(self, crops: Tensor) -> Tensor:
        """Codes int32 (B, A, N) of A views of each image, (B, A, 3, H, W) in [-1, 1]."""
        return self(crops.flatten(0, 1)).view(*crops.shape[:2], -1)


def encode_images(
    tokenizer: CodeAutoencoder, images: Tensor, batch_size: int = GPU_BATCH, precision: str = "exact"
) -> Tensor:
    """The codes int32 (B, N) of images (B, 3, H, W) in [-1, 1], by an `ImageEncoder`."""
    return ImageEncoder(tokenizer, batch_size, precision)(images)


class ImageDecoder:
    """Codes to images: the decoding half of a tokenizer, in a format and layout of its own.

    A GPU takes `batch_size` images at a time, halves of that where its memory does not suffice. Codes are looked up in
    the codebook's own format.

    Args:
        tokenizer: in evaluation mode and in its final place. It is left as it is; without further arguments its own
            weights are used, else a copy of them.
        precision: "none" decodes in the tokenizer's format; with "bf16" or "fp16" weights and activations have that
            one (the statistics of a norm are float32 all the same).
        compiled: by torch.compile, which takes its time at the first batch. Batches are then filled up to a power of
            two, so that few sizes are compiled.
        memory_format: of the copy's weights and feature maps; the default is `layout_of` the device.

    Raises:
        KeyError: an unknown precision.
        ValueError: a batch size below 1.
    """

    def __init__(
        self,
        tokenizer: CodeAutoencoder,
        precision: str = "none",
        compiled: bool = False,
        batch_size: int = GPU_BATCH,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        self.lookup, self.channels = tokenizer.quantize.get_codebook_entry, tokenizer.post_quant_conv.in_channels
        self.decode = nn.Sequential(tokenizer.post_quant_conv, tokenizer.decoder)
        self.compiled, self.parts = compiled, _Parts(batch_size)
        weight = tokenizer.post_quant_conv.weight
        self.form: dict[str, Any] = {"dtype": weight.dtype if precision == "none" else DTYPES[precision]}
        if precision != "none" or compiled or memory_format:
            self.form["memory_format"] = memory_format or layout_of(weight.device, compiled)
            self.decode = copy.deepcopy(self.decode).to(**self.form)
        if compiled:
            torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)  # a few per decoder
            self.decode.compile(dynamic=False)

    @torch.no_grad()
    def __call__(self, codes: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Images (B, 3, H, W) float32, nominally in [-1, 1], of codes (B, h*w).

        `grid` is (h, w); the default is a square.
        """
        edge = int(codes.shape[1] ** 0.5)
        shape = (self.channels, *(grid or (edge, edge)))
        return self.parts.apply(lambda part: self._images(part, shape), codes)

    def warm_up(self, codes_per_image: int) -> None:
        """Compile, for images of so many codes on a square grid, every size that a batch is filled up to."""
        sizes = {self._filled(count) for count in range(1, self.parts.batch_size + 1)} if self.compiled else ()
        for size in sorted(sizes):
            self(torch.zeros(size, codes_per_image, dtype=torch.int32, device=self.decode[0].weight.device))

    def _images(self, codes: Tensor, shape: Sequence[int]) -> Tensor:
        count = len(codes)
        if self.compiled:
            codes = torch.cat([codes, codes[:1].expand(self._filled(count) - count, -1)])
        quant = self.lookup(codes, (len(codes), *shape))
        return self.decode(quant.to(**self.form))[:count].float()

    def _filled(self, count: int) -> int:
        """The size of a compiled batch that holds `count` images."""
        return min(2 ** (count - 1).bit_length(), max(count, self.parts.batch_size)) if count else 0


def decode_codes(tokenizer: VQModel, codes: Tensor) -> Tensor:
    """Images of codes (B, h*w) on a square grid: (B, 3, H, W) float32, nominally in [-1, 1], by an `ImageDecoder`.

    Batches stay as small as the memory once made them for this tokenizer.
    """
    decoder = ImageDecoder(tokenizer)
    decoder.parts = _parts_of.setdefault(tokenizer, decoder.parts)
    return decoder(codes)
