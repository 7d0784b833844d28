"""Inception features as the package clean-fid makes them (Parmar et al., 2022, arXiv:2104.11222), mode "clean".

The weights are those of the established evaluator; what differs is how pictures get to 299 x 299: each channel is
resized by Pillow in float32 with antialiased bicubic weights, clipped to 0..255 and not rounded. The two give different
FIDs of the same pictures, so never compare one with the other.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluations.features import check_pictures
from evaluations.inception import POOL, Inception, exact_float32

SIZE = 299
_RESIZERS = 8  # threads


def clean_resize(picture: np.ndarray, size: int = SIZE) -> np.ndarray:
    """A picture uint8 (H, W, 3) as float32 (size, size, 3) in 0..255."""
    channels = [Image.fromarray(picture[:, :, c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255)


class CleanInception:
    """Pictures uint8 (N, H, W, 3), any size -> {"pool": float32 (N, 2048)} of the network in `inception`."""

    def __init__(self, inception: Inception) -> None:
        self._inception = inception
        self.comparable, self.label = inception.comparable, f"{inception.label}, clean-fid resize"

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        check_pictures(pictures)
        with ThreadPoolExecutor(_RESIZERS) as pool:
            resized = np.stack(list(pool.map(clean_resize, pictures.cpu().numpy())))
        images = torch.from_numpy(resized).to(self._inception.device).permute(0, 3, 1, 2)
        with exact_float32():
            return {"pool": self._inception.network(images)[POOL].flatten(1)}
