"""Checkpoints: one reader for every format, atomic writes, and the newest one of a folder.

Read are: the dict of the DDP trainers (``model``, ``optimizer``, ``steps``, ``args``, ``ema``), the sharded folders of
`utils/sharded_files.py`, the folder of the established FSDP trainer (``consolidated.pth``), DeepSpeed (``module``),
Lightning (``state_dict``), a bare state dict, safetensors and a Hugging Face folder (``model.safetensors``). Nothing is
ever unpickled beyond tensors, plain containers and `argparse.Namespace`, which the established trainers put into their
files.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from utils import sharded_files
from utils.files import atomic_path
from utils.sharded import like_sharded

CONTAINER_KEYS = ("model", "module", "state_dict")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
_FOLDER_FILES = ("consolidated.pth", "model.safetensors", "pytorch_model.bin")

# Given the weights that do not fit: the model that they would fit, in words; None when that cannot be told.
Suggest = Callable[[Mapping[str, Tensor]], "str | None"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


def read(path: str | Path, parts: Collection[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint file or folder onto the CPU, without running anything that it contains.

    `parts` names what is wanted of a sharded folder (others are read in full): "model", "ema", "optimizer".

    Raises:
        CheckpointError: missing, truncated, of an unknown format, or holding objects other than plain data.
    """
    if sharded_files.is_sharded(path):
        return sharded_files.read(path, parts=parts)
    path = file_of(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint (truncated or of another format): {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of tensors or of state dicts")
    return dict(content)


def file_of(path: str | Path) -> Path:
    """The file that holds the weights: `path` itself, or the known one in a folder.

    Raises:
        CheckpointError: when there is none.
    """
    path = Path(path)
    if path.is_dir():
        for name in _FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"the folder {path} holds none of {', '.join(_FOLDER_FILES)}")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    return path


def _refusal(path: Path, error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)|Unsupported global: GLOBAL (\S+)|class (\S+)", str(error))
    what = f" ({next(filter(None, found.groups()))})" if found else ""
    return (
        f"{path} was refused: it holds something other than tensors and plain data{what}, which could run code when "
        f"loaded; export its state dict to a .safetensors file where it was made"
    )


def state_dict_of(content: Mapping[str, Any], source: str | Path, prefer_ema: bool = False) -> dict[str, Tensor]:
    """The model's state dict inside what `read` gave, with wrapper prefixes (DDP, compile, FSDP) taken off.

    `prefer_ema` takes the averaged weights where there are any.
    """
    keys = ("ema", *CONTAINER_KEYS) if prefer_ema else CONTAINER_KEYS
    found = next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(
            f"{source} holds no model weights: expected one of {', '.join(keys)} or a bare state dict, "
            f"found {', '.join(map(str, list(content)[:6])) or 'nothing'}"
        )
    return {_unwrapped(key): value for key, value in found.items()}


def _unwrapped(key: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        if key.startswith(prefix):
            return _unwrapped(key[len(prefix) :])
    return key.replace("._fsdp_wrapped_module.", ".").replace("._orig_mod.", ".")


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    prefer_ema: bool = False,
    ignore: Iterable[str] = (),
    suggest: Suggest | None = None,
) -> None:
    """Load a checkpoint's weights into `model`, strictly.

    Keys that start with an entry of `ignore` are left out. `suggest` may name the model that would fit; its answer is
    part of the error.
    """
    weights = state_dict_of(read(path, parts=("ema", "model") if prefer_ema else ("model",)), path, prefer_ema)
    weights = {key: value for key, value in weights.items() if not key.startswith(tuple(ignore))}
    fit(model, weights, path, suggest)


def fit(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | Path,
    suggest: Suggest | None = None,
) -> None:
    """`model.load_state_dict`, strict, with an error that says what does not fit.

    Raises:
        CheckpointError: names the first missing and unexpected keys and the first wrong shape.
    """
    own = model.state_dict()
    wrong = [k for k, v in weights.items() if k in own and v.shape != own[k].shape]
    try:
        fitting = {k: like_sharded(v, own[k]) if k in own and k not in wrong else v for k, v in weights.items()}
        model.load_state_dict(fitting)
    except RuntimeError as error:
        missing = [key for key in own if key not in weights]
        unexpected = [key for key in weights if key not in own]
        facts = [
            f"missing {len(missing)} keys, the first {missing[0]}" if missing else "",
            f"{len(unexpected)} unexpected keys, the first {unexpected[0]}" if unexpected else "",
            f"{wrong[0]} is {tuple(weights[wrong[0]].shape)}, the model has {tuple(own[wrong[0]].shape)}"
            if wrong
            else "",
            (suggest(weights) if suggest else None) or "",
        ]
        raise CheckpointError(f"{source} is for another model: {'; '.join(filter(None, facts))}") from error


def save(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that `path` is at every moment either the old file or the whole new one."""
    with atomic_path(path) as temporary:
        torch.save(dict(content), temporary)


def save_weights(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, whole or not at all.

    The library gives its files to their owner alone; this one gets the rights that any new file has, so that the
    others on a cluster can read it too.
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        rights = temporary.stat().st_mode
        safetensors.torch.save_file(stored, temporary, dict(metadata or {}))
        temporary.chmod(rights)


def step_of(path: str | Path) -> int:
    """The step number in a checkpoint's name (``0005000.pt`` -> 5000, the folder ``0005000`` too); -1 without one."""
    stem = Path(path).stem
    return int(stem) if stem.isdigit() else -1


def all_of(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder` by their steps: files ``{step}.pt`` and folders ``{step}``."""
    found = [path for path in Path(folder).glob("*") if step_of(path) >= 0]
    kept = [path for path in found if path.suffix == ".pt" or (path.is_dir() and not path.suffix)]
    return sorted(kept, key=step_of)


def latest(folder: str | Path) -> Path | None:
    """The checkpoint with the highest step in `folder`; None when there is none."""
    return next(reversed(all_of(folder)), None)


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; `keep` = 0 keeps all."""
    for path in all_of(folder)[:-keep] if keep else []:
        if path.is_dir():
            sharded_files.remove(path)
        else:
            path.unlink(missing_ok=True)
