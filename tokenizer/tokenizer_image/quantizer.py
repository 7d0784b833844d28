"""The established import path of the quantizer. The family is in `quantizers/`."""

from __future__ import annotations

from tokenizer.tokenizer_image.quantizers.base import USAGE_WINDOW, EmbeddingLoss
from tokenizer.tokenizer_image.quantizers.entropy import ENTROPY_TEMPERATURE, compute_entropy_loss
from tokenizer.tokenizer_image.quantizers.vq import VectorQuantizer

__all__ = ["ENTROPY_TEMPERATURE", "USAGE_WINDOW", "EmbeddingLoss", "VectorQuantizer", "compute_entropy_loss"]
