"""From a command's arguments to a published VQGAN of taming-transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml

from tokenizer.coding import layout_of
from tokenizer.vqgan.model import VQGAN_FROM_TAMING, VQModel
from utils import checkpoint

_ROOT = Path(__file__).resolve().parents[2]


def add_vqgan_args(parser: argparse.ArgumentParser, default: str) -> None:
    """Which VQGAN, and where its files are."""
    group = parser.add_argument_group("VQGAN")
    group.add_argument("--vqgan", choices=list(VQGAN_FROM_TAMING), default=default, help="which one")
    group.add_argument("--vqgan-ckpt", help="its checkpoint; the default is where pretrained_models/ has it")
    group.add_argument(
        "--vqgan-config", help="its configuration, for one of your own; the default is in tokenizer/vqgan"
    )


def load_vqgan(args: argparse.Namespace, device: torch.device) -> VQModel:
    """The model of --vqgan in evaluation mode.

    Raises:
        CheckpointError: no checkpoint where it should be, or one for another model.
    """
    model = VQModel(**read_config(args.vqgan_config or _ROOT / VQGAN_FROM_TAMING[args.vqgan][0]))
    checkpoint.load_weights(model, vqgan_checkpoint(args), ignore=("loss.",))
    return model.to(device, memory_format=layout_of(device)).eval()


def vqgan_checkpoint(args: argparse.Namespace) -> str:
    """The path of its weights.

    Raises:
        CheckpointError: when it is not there; says what to do where only the unconverted file is.
    """
    path = Path(args.vqgan_ckpt or VQGAN_FROM_TAMING[args.vqgan][1])
    unconverted = path.with_suffix(".ckpt")
    if path.exists() or path.is_dir():
        return str(path)
    if unconverted.is_file():
        raise checkpoint.CheckpointError(
            f"there is no {path}, but {unconverted}: convert it with "
            f"python3 tools/convert_pytorch_lightning_to_torch.py {unconverted}"
        )
    raise checkpoint.CheckpointError(f"there is no checkpoint of {args.vqgan} at {path}; give --vqgan-ckpt")


def read_config(path: str | Path) -> dict[str, Any]:
    """The keywords of `VQModel` in a taming-transformers YAML file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no YAML, or has no model.params with ddconfig, n_embed and embed_dim.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no configuration {path}")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    lacking = {"ddconfig", "n_embed", "embed_dim"} - set(params if isinstance(params, dict) else ())
    if lacking:
        raise ValueError(f"{path} must hold model.params with {', '.join(sorted(lacking))}")
    return params
