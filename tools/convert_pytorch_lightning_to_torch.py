"""Take the weights out of PyTorch Lightning checkpoints of taming-transformers and latent-diffusion.

    python3 tools/convert_pytorch_lightning_to_torch.py                 the published VQGANs in pretrained_models/
    python3 tools/convert_pytorch_lightning_to_torch.py PATH/last.ckpt  any others

Writes {"state_dict": ...} to the same name with .pth beside each file. Lightning files hold objects of packages that
need not be here, and could hold anything: nothing of theirs is imported or run. Where such an object stood, the reader
puts an empty stand-in; tensors are kept as they are.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from tokenizer.vqgan.model import VQGAN_FROM_TAMING
from utils import checkpoint
from utils.args import make_parser
from utils.errors import run

_BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError)
PUBLISHED = [str(Path(path).with_suffix(".ckpt")) for _, path in VQGAN_FROM_TAMING.values()]


class Nothing:
    """Takes the place of an object of an unknown class: accepts everything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Nothing:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Entries:
    """The same for what may be a dict of an unknown class: torch's reader fills real ones alone."""

    def __new__(cls, *_: Any, **__: Any) -> OrderedDict:
        return OrderedDict()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of ``state_dict`` in a Lightning checkpoint.

    Raises:
        CheckpointError: when the file is none, or has no state dict of tensors.
    """
    content = _read(path)
    weights = content.get("state_dict") if isinstance(content, Mapping) else None
    tensors = {k: v for k, v in weights.items() if isinstance(v, Tensor)} if isinstance(weights, Mapping) else {}
    if not tensors:
        raise checkpoint.CheckpointError(f"{path} has no state_dict with tensors in it")
    return tensors


def _read(path: str | Path) -> Any:
    """The content of the file with stand-ins for everything but tensors and plain data."""
    reason = ""
    for stand_in in (Entries, Nothing):  # which one fits depends on how the classes were pickled
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            allowed = [(Nothing if name.startswith("numpy.") else stand_in, name) for name in unknown]
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True)
        except _BROKEN as error:
            text = str(error).split("WeightsUnpickler error: ")[-1].strip()
            reason = text.splitlines()[0] if text else type(error).__name__
    raise checkpoint.CheckpointError(f"{path} is not a readable Lightning checkpoint: {reason}")


def convert(paths: list[str]) -> list[Path]:
    """Convert every file of `paths`; returns the new ones.

    Files that are missing or broken are named, and the others converted all the same.

    Raises:
        ValueError: at the end, when a file could not be converted.
    """
    written, problems = [], []
    for source in map(Path, paths):
        target = source.with_suffix(".pth")
        try:
            if not source.is_file():
                raise FileNotFoundError(f"there is no {source}")
            weights = read_state_dict(source)
        except (FileNotFoundError, checkpoint.CheckpointError) as error:
            problems.append(str(error))
            continue
        print(f"saving to {target}")
        checkpoint.save({"state_dict": weights}, target)
        written.append(target)
    if problems:
        raise ValueError(f"{len(written)} of {len(paths)} files were converted; " + "; ".join(problems))
    return written


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("paths", nargs="*", default=PUBLISHED, metavar="CKPT", help="the files; default: the published")
    return flags


if __name__ == "__main__":
    run(lambda: convert(parser().parse_args().paths))
