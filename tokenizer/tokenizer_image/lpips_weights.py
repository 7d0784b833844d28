"""Finds the published LPIPS weights: the VGG16 trunk of torchvision and the five linear layers on top.

The linear layers (7 KB) come with the PyPI package `lpips`; the trunk (528 MB) is read from a given file or
downloaded by torchvision into its cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor

from utils import checkpoint

URL_MAP = {"vgg_lpips": "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1"}
CKPT_MAP = {"vgg_lpips": "vgg.pth"}
MD5_MAP = {"vgg_lpips": "d507d7349b931f0638a25a48a722f98a"}

VGG_URL = "https://download.pytorch.org/models/"
VGG_FILE = "vgg16-397923af.pth"


def md5_hash(path: str | Path) -> str:
    """MD5 of a file, as 32 hexadecimal digits."""
    return hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()


def download(url: str, local_path: str | Path, timeout: float = 30.0) -> None:
    """Fetch `url` into `local_path`, which appears only when complete. Raises OSError where that fails."""
    local_path = Path(local_path)
    local_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local_path.parent) as folder:
        partial = Path(folder) / local_path.name
        with urllib.request.urlopen(url, timeout=timeout) as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target)
        os.replace(partial, local_path)


def get_ckpt_path(name: str = "vgg_lpips", root: str | Path | None = None) -> Path:
    """A verified file of the linear LPIPS weights.

    Looked for in the installed package `lpips`, then in `root`, and else downloaded into `root` (by default
    the PyTorch hub cache). Raises ValueError for an unknown name or a download that is not the right file.
    """
    if name not in CKPT_MAP:
        raise ValueError(f"The LPIPS weights must be one of {sorted(CKPT_MAP)}, but are {name!r}.")
    root = Path(root) if root else Path(torch.hub.get_dir()) / "checkpoints" / "lpips"
    path = root / CKPT_MAP[name]
    for candidate in (_packaged_file(), path):
        if candidate is not None and candidate.is_file() and md5_hash(candidate) == MD5_MAP[name]:
            return candidate
    try:
        download(URL_MAP[name], path)
    except OSError as error:
        raise ValueError(
            f"The linear LPIPS weights are missing ({error}): install the PyPI package 'lpips', or put "
            f"its file weights/v0.1/vgg.pth at {path}."
        ) from error
    if md5_hash(path) != MD5_MAP[name]:
        path.unlink()
        raise ValueError(f"{URL_MAP[name]} did not give the linear LPIPS weights: install the PyPI package 'lpips'.")
    return path


def _packaged_file() -> Path | None:
    # By distribution, not by import: a module of our own is called lpips as well.
    try:
        return Path(str(distribution("lpips").locate_file("lpips/weights/v0.1/vgg.pth")))
    except PackageNotFoundError:
        return None


def linear_weights(name: str = "vgg_lpips") -> list[Tensor]:
    """Weights of the five linear layers, each (1, C, 1, 1), from the shallowest VGG tap to the deepest."""
    state = checkpoint.read(get_ckpt_path(name))
    return [state[f"lin{i}.model.1.weight"] for i in range(5)]


def vgg16_features(weights_path: str | Path | None = None) -> dict[str, Tensor]:
    """Convolutions of torchvision's ImageNet VGG16: keys ``'{index}.weight'`` and ``'{index}.bias'``.

    Args:
        weights_path: state dict of torchvision's vgg16; None takes torchvision's copy, downloaded once.
    """
    if weights_path:
        state = checkpoint.read(weights_path)
    else:
        state = _torchvision_vgg16()
    features = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    if not features:
        raise ValueError(f"{weights_path} must hold torchvision's vgg16 (keys 'features.0.weight', ...).")
    return features


def _torchvision_vgg16() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights

    try:
        return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"The perceptual loss needs torchvision's VGG16 weights, which cannot be downloaded ({error}): "
            f"put {VGG_URL}{VGG_FILE} into {folder} or name that file with --vgg-path, or do without it by "
            "--perceptual-weight 0."
        ) from error
